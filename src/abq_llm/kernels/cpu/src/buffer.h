// Memory aligned to 64 bytes that grows and is not cleared.
#pragma once

#include <cstdint>
#include <memory>

namespace abq {

class Buffer {
   public:
    uint8_t* reserve(int64_t bytes) {
        if (bytes > size_) {
            memory_.reset(new uint8_t[bytes + 63]);
            size_ = bytes;
        }
        return memory_.get() + (-reinterpret_cast<uintptr_t>(memory_.get()) & 63);
    }

   private:
    std::unique_ptr<uint8_t[]> memory_;
    int64_t size_ = 0;
};

}  // namespace abq
