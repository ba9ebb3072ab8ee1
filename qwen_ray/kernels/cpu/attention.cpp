// Paged attention alone; with all that belongs to a layer it is in `layers.cpp`.
#include "attention.h"

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void attend_##SUFFIX(const T* q, int64_t q_stride, const T* keys, const T* values,                      \
                                    const Sequences* s, int64_t heads, int64_t kv_heads, int64_t dim, float scale,     \
                                    T* out, int num_threads) {                                                         \
        Attention<T> attention{*s, q, q_stride, keys, values, heads, kv_heads, dim, scale, out};                       \
        auto work = attention.cut();                                                                                   \
        Team team;                                                                                                     \
        _Pragma("omp parallel num_threads(num_threads) if (work.size > MANY)") attention.all(team, work);              \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
