"""Block-wise calibration: one decoder block at a time, the fp stream and the quantized stream side by side."""
