// A gated MLP at once: few rows are computed faster than threads are put to sleep and woken between its parts.
#include "pointwise.h"
#include "team.h"

namespace {

constexpr int64_t PART = 1024;  // of a row's gates, that a thread takes at a time

template <class T>
void mlp(const T* x, int64_t x_stride, const Matrix& gate_up, const Matrix& down, T* out, int64_t num_rows,
         int num_threads) {
    int64_t size = down.size, num_parts = (size + PART - 1) / PART;
    std::unique_ptr<T[]> both(new T[num_rows * 2 * size]), inner(new T[num_rows * size]);
#pragma omp parallel num_threads(num_threads) if (gate_up.num_bytes() > WORTH_A_TEAM)
    {
        multiply(x, x_stride, gate_up, both.get(), num_rows);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_rows * num_parts; ++i) {
            int64_t t = i / num_parts, first = i % num_parts * PART, count = size - first < PART ? size - first : PART;
            const T* gate = both.get() + t * 2 * size + first;
            gate_row(gate, gate + size, inner.get() + t * size + first, count);
        }
        multiply(inner.get(), size, down, out, num_rows);
    }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void mlp_##SUFFIX(const T* x, int64_t x_stride, const Matrix* gate_up, const Matrix* down, T* out,      \
                                 int64_t num_rows, int num_threads) {                                                  \
        mlp(x, x_stride, *gate_up, *down, out, num_rows, num_threads);                                                 \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
