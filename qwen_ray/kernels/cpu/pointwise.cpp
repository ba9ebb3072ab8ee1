// What stands between matrix products: norms, rotation, the gate. One pass over the data each, float32 inside.
#include <cmath>

#include "vectors.h"

namespace {

constexpr int64_t MANY = 1 << 16;  // elements from which on threads are worth waking

// Row (t, h) of x begins at t * stride + h * size, of out at (t * heads + h) * size.
template <class T>
void rms_norm(const T* x, int64_t stride, const T* weight, float eps, T* out, int64_t num_tokens, int64_t heads,
              int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * heads * size > MANY)
    for (int64_t row = 0; row < num_tokens * heads; ++row) {
        const T* from = x + row / heads * stride + row % heads * size;
        T* to = out + row * size;
        f32x16 squares{};
        for (int64_t i = 0; i < size; i += 16) {
            f32x16 v = load_up_to_16(from + i, size - i);
            squares += v * v;
        }
        float scale = 1.0f / std::sqrt(sum(squares) / float(size) + eps);
        for (int64_t i = 0; i < size; i += 16) {
            f32x16 v = rounded<T>(load_up_to_16(from + i, size - i) * scale);
            save_up_to_16(to + i, load_up_to_16(weight + i, size - i) * v, size - i);
        }
    }
}

template <class T>
void rotate(const T* x, int64_t stride, const T* cos, const T* sin, T* out, int64_t num_tokens, int64_t heads,
            int64_t size, int num_threads) {
    int64_t half = size / 2;
#pragma omp parallel for num_threads(num_threads) if (num_tokens * heads * size > MANY)
    for (int64_t row = 0; row < num_tokens * heads; ++row) {
        int64_t t = row / heads;
        const T* from = x + t * stride + row % heads * size;
        T* to = out + row * size;
        for (int64_t i = 0; i < half; i += 16) {
            int64_t rest = half - i;
            f32x16 a = load_up_to_16(from + i, rest), b = load_up_to_16(from + half + i, rest);
            f32x16 c = load_up_to_16(cos + t * half + i, rest), s = load_up_to_16(sin + t * half + i, rest);
            save_up_to_16(to + i, a * c - b * s, rest);
            save_up_to_16(to + half + i, b * c + a * s, rest);
        }
    }
}

template <class T>
void silu_and_mul(const T* gate_up, T* out, int64_t num_tokens, int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_tokens * size > MANY)
    for (int64_t t = 0; t < num_tokens; ++t) {
        const T *gate = gate_up + t * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += 16) {
            f32x16 v = rounded<T>(silu(load_up_to_16(gate + i, size - i)));
            save_up_to_16(out + t * size + i, v * load_up_to_16(up + i, size - i), size - i);
        }
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
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
