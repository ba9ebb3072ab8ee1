// A layer's experts in one call.
#include "experts.h"

#include "space.h"

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void run_experts_##SUFFIX(const T* x, int64_t x_stride, int64_t num_tokens, const int64_t* slots,       \
                                         int64_t top_k, const float* weights, const ExpertsPart* part, T* out,         \
                                         int num_threads) {                                                            \
        Space<T> room(Experts<T>::room(*part, num_tokens, top_k));                                                     \
        Experts<T> experts(*part, num_tokens, top_k, room.get());                                                      \
        Team team;                                                                                                     \
        int64_t each = part->gate_up.first.num_bytes();                                                                \
        _Pragma("omp parallel num_threads(num_threads) if (num_tokens * top_k * each > WORTH_A_TEAM)")                 \
        experts.run(team, x, x_stride, slots, weights, *part, out);                                                    \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
