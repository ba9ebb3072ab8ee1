// Memory of a step.
#pragma once

#include <sys/mman.h>

#include <memory>

#include "vectors.h"

// Memory for T that begins on a line of a cache: rows are read by whole vectors. Much of it is asked for in large
// pages, since all of them are new each time.
template <class T>
class Space {
  public:
    explicit Space(int64_t size) : lines(new Line[(size * sizeof(T) + sizeof(Line) - 1) / sizeof(Line)]) {
        constexpr uintptr_t PAGE = 4096, MUCH = 4 << 20;
        uintptr_t begin = ((uintptr_t)lines.get() + PAGE - 1) / PAGE * PAGE;
        uintptr_t end = ((uintptr_t)lines.get() + size * sizeof(T)) / PAGE * PAGE;
        if (end > begin + MUCH) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
    }
    T* get() const { return (T*)lines.get(); }

  private:
    std::unique_ptr<Line[]> lines;
};
