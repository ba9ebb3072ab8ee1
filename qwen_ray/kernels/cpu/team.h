// What a team of threads computes together: every thread of it calls, with the same arguments, and when a call is over
// its whole result is there for all. Outside of a parallel region the one thread that calls does all of it.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <memory>

#include "vectors.h"

// The threads of one parallel region, which make one before it. Where cores are shared, one that waits soon lets others
// run, who may be those that it waits for: OpenMP's barriers would hold the core for a millisecond, each of them.
class Team {
  public:
    // Until all have come.
    void meet() {
        int size = omp_get_num_threads();
        if (size == 1) return;
        int now = turn.load(std::memory_order_acquire);
        if (num_there.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            num_there.store(0, std::memory_order_relaxed);
            turn.store(now + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; turn.load(std::memory_order_acquire) == now; ++i) {
            if (i < PATIENCE)
                _mm_pause();
            else
                sched_yield();
        }
    }

  private:
    static constexpr int PATIENCE = 500;  // some 20 microseconds
    alignas(64) std::atomic<int> num_there{0};
    alignas(64) std::atomic<int> turn{0};
};

// [out_size, size]: rows of T, or packed in 8 or 4 bits as `quantized.py` says. As `native.py` lays it out.
struct Matrix {
    const void* values;
    int64_t row_bytes;
    const void *scales, *least;  // null, if not packed
    const void* bias;            // T for each row, or null
    int64_t out_size, size;
    int32_t bits, group;  // bits 0: rows of T

    int64_t num_bytes() const { return out_size * row_bytes; }
};

// out [num_rows, out_size] = x w^T + bias; row r of x begins at r * x_stride.
template <class T>
void multiply(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows);
template <class T>
void multiply_eight_bits(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows);
template <class T>
void multiply_four_bits(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows);

constexpr int64_t WORTH_A_TEAM = 128 << 10;  // bytes of a matrix

// What one thread of the team makes, for all of them.
template <class Make>
auto made_by_one(Make make) {
    decltype(make()) made;
#pragma omp single copyprivate(made)
    made = make();
    return made;
}

// Rows of x in the form X that a product wants them in: X(count, ...) and take(row, from). Few are made by each thread
// for itself, which is faster than waiting for others; many by all together.
template <class X, class Take, class... Arguments>
std::shared_ptr<X> made_ready(Team& team, int64_t count, Take take, Arguments... arguments) {
    constexpr int64_t FEW = 16;
    auto make = [&] { return std::make_shared<X>(count, arguments...); };
    if (count <= FEW) {
        auto ready = make();
        for (int64_t c = 0; c < count; ++c) take(*ready, c);
        return ready;
    }
    auto ready = made_by_one(make);
#pragma omp for nowait
    for (int64_t c = 0; c < count; ++c) take(*ready, c);
    team.meet();
    return ready;
}
