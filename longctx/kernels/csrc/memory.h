// Memory for weights and for work.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace longctx {

constexpr size_t HUGE_PAGE = 2 << 20;

inline void* allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, bytes >= HUGE_PAGE ? HUGE_PAGE : 64, bytes)) throw std::bad_alloc();
    // Huge pages miss the page table less; the rest that does not fill one stays on small ones.
    if (bytes >= HUGE_PAGE) madvise(memory, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    return memory;
}

// Memory that grows and is kept, and is not filled: fresh memory would cost more than a small layer.
class Memory {
public:
    ~Memory() { std::free(memory_); }
    char* of(size_t bytes) {
        if (bytes > bytes_) {
            std::free(memory_);
            memory_ = nullptr, bytes_ = 0; // should the next line throw
            memory_ = allocate(bytes);
            bytes_ = bytes;
        }
        return (char*)memory_;
    }

private:
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

} // namespace longctx
