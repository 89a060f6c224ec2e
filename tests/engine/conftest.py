from tests.kernels.cpu.conftest import built, level

__all__ = ["built", "level"]
