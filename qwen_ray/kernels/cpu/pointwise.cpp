// What stands between matrix products, one row after the other.
#include <vector>

#include "pointwise.h"

namespace {

constexpr int64_t MANY = 1 << 16;  // elements from which on threads are worth waking

// Row (t, h) of x begins at t * stride + h * size, of out at (t * heads + h) * size.
template <class T>
void rms_norm(const T* x, int64_t stride, const T* weight, float eps, T* out, int64_t num_tokens, int64_t heads,
              int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * heads * size > MANY)
    for (int64_t row = 0; row < num_tokens * heads; ++row)
        norm_row(x + row / heads * stride + row % heads * size, weight, eps, out + row * size, size);
}

template <class T>
void rotate(const T* x, int64_t stride, const T* cos, const T* sin, T* out, int64_t num_tokens, int64_t heads,
            int64_t size, int num_threads) {
    int64_t half = size / 2;
#pragma omp parallel for num_threads(num_threads) if (num_tokens * heads * size > MANY)
    for (int64_t row = 0; row < num_tokens * heads; ++row) {
        int64_t t = row / heads;
        rotate_row(x + t * stride + row % heads * size, cos + t * half, sin + t * half, out + row * size, size);
    }
}

template <class T>
void silu_and_mul(const T* gate_up, T* out, int64_t num_tokens, int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * size > MANY)
    for (int64_t t = 0; t < num_tokens; ++t)
        gate_row(gate_up + t * 2 * size, gate_up + (t * 2 + 1) * size, out + t * size, size);
}

// Logits [tokens, size] to weights and ids [tokens, count].
template <class T>
void route(const T* logits, int64_t num_tokens, int64_t size, int64_t count, bool renormalizes, float* weights,
           int64_t* ids, int num_threads) {
#pragma omp parallel num_threads(num_threads) if (num_tokens * size * count > MANY)
    {
        std::vector<float> room(size + 16);
#pragma omp for
        for (int64_t t = 0; t < num_tokens; ++t)
            route_row(logits + t * size, size, count, renormalizes, room.data(), ids + t * count, weights + t * count);
    }
}

template <class T>
void greatest(const T* x, int64_t num_rows, int64_t size, int64_t* places, bool* all_finite, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows > 1 && num_rows * size > MANY)
    for (int64_t row = 0; row < num_rows; ++row) {
        Greatest found = greatest_of_row(x + row * size, size);
        places[row] = found.place;
        all_finite[row] = found.all_finite;
    }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void rms_norm_##SUFFIX(const T* x, int64_t stride, const T* weight, float eps, T* out,                  \
                                      int64_t num_tokens, int64_t heads, int64_t size, int num_threads) {              \
        rms_norm(x, stride, weight, eps, out, num_tokens, heads, size, num_threads);                                   \
    }                                                                                                                  \
    extern "C" void rotate_##SUFFIX(const T* x, int64_t stride, const T* cos, const T* sin, T* out,                    \
                                    int64_t num_tokens, int64_t heads, int64_t size, int num_threads) {                \
        rotate(x, stride, cos, sin, out, num_tokens, heads, size, num_threads);                                        \
    }                                                                                                                  \
    extern "C" void silu_and_mul_##SUFFIX(const T* gate_up, T* out, int64_t num_tokens, int64_t size,                  \
                                          int num_threads) {                                                           \
        silu_and_mul(gate_up, out, num_tokens, size, num_threads);                                                     \
    }                                                                                                                  \
    extern "C" void route_##SUFFIX(const T* logits, int64_t num_tokens, int64_t size, int64_t count, int renormalizes, \
                                   float* weights, int64_t* ids, int num_threads) {                                    \
        route(logits, num_tokens, size, count, renormalizes, weights, ids, num_threads);                               \
    }                                                                                                                  \
    extern "C" void greatest_##SUFFIX(const T* x, int64_t num_rows, int64_t size, int64_t* places, bool* all_finite,   \
                                      int num_threads) {                                                               \
        greatest(x, num_rows, size, places, all_finite, num_threads);                                                  \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
