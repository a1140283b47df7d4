// Buffers that end right before a page that may not be touched, and numbers to put there.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr size_t kArena = 4 << 20;

// A buffer whose end meets a page without rights.
class Guarded {
 public:
  Guarded() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* at = mmap(nullptr, kArena + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(static_cast<char*>(at) + kArena, page, PROT_NONE) != 0) {
      std::perror("guard page");
      std::exit(2);
    }
    end_ = static_cast<char*>(at) + kArena;
  }
  template <class T>
  T* last(size_t count) {
    if (count * sizeof(T) > kArena) std::abort();
    return reinterpret_cast<T*>(end_ - count * sizeof(T));
  }

 private:
  char* end_;
};

uint32_t state = 1;
uint32_t next() { return state = state * 1664525 + 1013904223; }
uint32_t next(uint32_t below) { return (next() >> 8) % below; }
float uniform() { return static_cast<float>(next() >> 8) / 8388608.0f - 1; }

}  // namespace
