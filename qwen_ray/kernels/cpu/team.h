// What a team of threads computes together: every thread of it calls, with the same arguments, and when a call is over
// its whole result is there for all. Outside of a parallel region the one thread that calls does all of it.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
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

// [out_size, size]: rows of T, or packed in 8 or 4 bits as `quantized.py` says. As `parts.py` lays it out.
struct Matrix {
    const void* values;
    int64_t row_bytes;
    const void *scales, *least;  // null, if not packed
    const void* bias;            // T for each row, or null
    int64_t out_size, size;
    int32_t bits, group;  // bits 0: rows of T

    int64_t num_bytes() const { return out_size * row_bytes; }
};

// Matrices of one shape, one after the other in memory.
struct Stack {
    Matrix first;
    int64_t count;

    Matrix operator[](int64_t number) const {
        constexpr int64_t LANES = 16, SCALE = sizeof(float), HALF = 2;
        int64_t rows = first.bits ? (first.out_size + LANES - 1) / LANES * LANES : first.out_size;
        Matrix found = first;
        auto go_on = [&](const void*& tensor, int64_t each) {
            if (tensor) tensor = (const char*)tensor + number * each;
        };
        go_on(found.values, rows * first.row_bytes);
        int64_t scales = first.bits == 4 ? rows * (first.row_bytes * 2 / first.group) * HALF : rows * SCALE;
        go_on(found.scales, scales);
        go_on(found.least, scales);
        return found;
    }
};

// A matrix and the rows of x, one after the other, that it is for.
struct Share {
    Matrix w;
    int64_t first, count;
};

// Row r of out = row r of x times w^T + bias, for the rows of each share, one share after the other. There is one share,
// or several of FEW_ROWS each at most, whose matrices have one shape. Rows of x are x_stride apart.
constexpr int64_t FEW_ROWS = 128;
template <class T>
void multiply(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out);
template <class T>
void multiply_eight_bits(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out);
template <class T>
void multiply_four_bits(Team& team, const T* x, int64_t x_stride, const Share* shares, int64_t num_shares, T* out);

// The same for all rows of x.
template <class T>
void multiply(Team& team, const T* x, int64_t x_stride, const Matrix& w, T* out, int64_t num_rows) {
    Share all{w, 0, num_rows};
    multiply(team, x, x_stride, &all, 1, out);
}

// A single share, if it is one, `at_once` rows after the other: some(shares, number of shares).
template <class Some>
void in_parts(const Share* shares, int64_t num_shares, int64_t at_once, Some some) {
    if (num_shares > 1) return some(shares, num_shares);
    for (int64_t begin = 0; begin < shares->count; begin += at_once) {
        Share part{shares->w, shares->first + begin, std::min(shares->count - begin, at_once)};
        some(&part, 1);
    }
}

constexpr int64_t WORTH_A_TEAM = 128 << 10;  // bytes of a matrix

// What one thread of the team makes, for all of them.
template <class Make>
auto made_by_one(Make make) {
    decltype(make()) made;
#pragma omp single copyprivate(made)
    made = make();
    return made;
}

// Rows of x in the form X that a product wants them in: take(made, share, row of it). Few are made by each thread for
// itself, which is faster than waiting for others; many by all together.
template <class X, class Take, class... Arguments>
std::shared_ptr<X> made_ready(Team& team, const Share* shares, int64_t num_shares, Take take, Arguments... arguments) {
    constexpr int64_t FEW = 16;
    auto make = [&] { return std::make_shared<X>(arguments...); };
    int64_t begin = shares->first, end = shares[num_shares - 1].first + shares[num_shares - 1].count;
    if (end - begin <= FEW) {
        auto ready = make();
        for (int64_t s = 0; s < num_shares; ++s)
            for (int64_t c = 0; c < shares[s].count; ++c) take(*ready, s, c);
        return ready;
    }
    auto ready = made_by_one(make);
#pragma omp for nowait
    for (int64_t row = begin; row < end; ++row) {
        auto behind = [](int64_t row, const Share& share) { return row < share.first; };
        int64_t s = std::upper_bound(shares, shares + num_shares, row, behind) - shares - 1;
        take(*ready, s, row - shares[s].first);
    }
    team.meet();
    return ready;
}
