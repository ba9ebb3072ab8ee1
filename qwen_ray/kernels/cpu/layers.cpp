// Layers at once, or a half of one: few rows are computed faster than Python goes from kernel to kernel, and than threads
// are put to sleep and woken in between. To the last bit what the kernels give one after the other.
#include <algorithm>

#include "attention.h"
#include "experts.h"
#include "pointwise.h"
#include "space.h"
#include "team.h"

namespace {

constexpr int64_t PART_OF_ROW = 1024;  // of a row's gates, that a thread takes at a time

// What follows is as `native.py` lays it out.
struct Step {
    Sequences sequences;
    const void *cos, *sin;  // [rows, dim / 2]
    const int64_t* slots;
    int64_t heads, kv_heads, dim;
    float scale, eps;
};

struct AttentionPart {
    Matrix qkv, o;
    const void *q_norm, *k_norm;  // null: none
    void *keys, *values;
};

struct MlpPart {
    Matrix gate_up, down;
};

struct Layer {
    const void* attention_norm;
    AttentionPart attention;
    const void* mlp_norm;
    MlpPart mlp;
};

// A step's attention, projections and all: for one layer after the other, in room that is given.
template <class T>
class Attends {
  public:
    Attends(const Step& step, int64_t num_rows, T* room)
        : step(step),
          num_rows(num_rows),
          num_heads(step.heads + 2 * step.kv_heads),
          projected(room),
          q(projected + num_rows * num_heads * step.dim),
          attended(q + num_rows * step.heads * step.dim),
          work(over(nullptr, nullptr).cut()) {}

    static int64_t room(const Step& step, int64_t num_rows) {
        return num_rows * (3 * step.heads + 2 * step.kv_heads) * step.dim;
    }

    // Of a team. `out` may be x.
    void run(Team& team, const T* x, int64_t x_stride, const AttentionPart& part, T* out) {
        multiply(team, x, x_stride, part.qkv, projected, num_rows);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num_rows * num_heads; ++i) place(part, i / num_heads, i % num_heads);
        team.meet();
        over(part.keys, part.values).all(team, work);
        multiply(team, attended, step.heads * step.dim, part.o, out, num_rows);
    }

  private:
    Attention<T> over(const void* keys, const void* values) const {
        return {step.sequences, q,             step.heads * step.dim, (const T*)keys, (const T*)values,
                step.heads,     step.kv_heads, step.dim,              step.scale,     attended};
    }

    // Head h of row t, of first all queries', then all keys', then all values', to where attention finds it.
    void place(const AttentionPart& part, int64_t t, int64_t h) const {
        int64_t heads = step.heads, kv_heads = step.kv_heads, dim = step.dim;
        T *from = projected + (t * num_heads + h) * dim, *keys = (T*)part.keys, *values = (T*)part.values;
        const T* norm = (const T*)(h < heads ? part.q_norm : part.k_norm);
        int64_t cached = step.slots[t] * kv_heads * dim;
        if (h >= heads + kv_heads) {
            std::memcpy(values + cached + (h - heads - kv_heads) * dim, from, dim * sizeof(T));
            return;
        }
        if (norm) norm_row(from, norm, step.eps, from, dim);
        T* to = h < heads ? q + (t * heads + h) * dim : keys + cached + (h - heads) * dim;
        rotate_row(from, (const T*)step.cos + t * (dim / 2), (const T*)step.sin + t * (dim / 2), to, dim);
    }

    const Step& step;
    int64_t num_rows, num_heads;
    T *projected, *q, *attended;
    Work work;
};

// A gated MLP, in room that is given. Some rows at a time: what lies between two products stays in caches.
template <class T>
class Gates {
  public:
    Gates(int64_t size, int64_t num_rows, T* room)
        : size(size), num_rows(num_rows), both(room), inner(room + std::min(num_rows, AT_ONCE) * 2 * size) {}

    static int64_t room(int64_t size, int64_t num_rows) { return std::min(num_rows, AT_ONCE) * 3 * size; }

    // Of a team. `out` may be x.
    void run(Team& team, const T* x, int64_t x_stride, const MlpPart& part, T* out) {
        for (int64_t begin = 0; begin < num_rows; begin += AT_ONCE)
            run_some(team, x + begin * x_stride, x_stride, part, out + begin * part.down.out_size,
                     std::min(num_rows - begin, AT_ONCE));
    }

  private:
    static constexpr int64_t AT_ONCE = 512;

    void run_some(Team& team, const T* x, int64_t x_stride, const MlpPart& part, T* out, int64_t num_rows) const {
        int64_t num_parts = (size + PART_OF_ROW - 1) / PART_OF_ROW;
        multiply(team, x, x_stride, part.gate_up, both, num_rows);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num_rows * num_parts; ++i) {
            int64_t t = i / num_parts, first = i % num_parts * PART_OF_ROW;
            int64_t count = size - first < PART_OF_ROW ? size - first : PART_OF_ROW;
            const T* gate = both + t * 2 * size + first;
            gate_row(gate, gate + size, inner + t * size + first, count);
        }
        team.meet();
        multiply(team, inner, size, part.down, out, num_rows);
    }

    int64_t size, num_rows;
    T *both, *inner;
};

// x [num_rows, hidden] becomes what it is behind the layers. Beside it there are one more copy, which is what a part is
// given and then what it adds, and the room of the larger part: what the planner counts.
template <class T>
void run_layers(const Layer* layers, int64_t num_layers, const Step& step, T* x, int64_t num_rows, int64_t hidden,
                int num_threads) {
    int64_t size = layers->mlp.down.size;
    Space<T> room(std::max(Attends<T>::room(step, num_rows), Gates<T>::room(size, num_rows))), copy(num_rows * hidden);
    Attends<T> attention(step, num_rows, room.get());
    Gates<T> mlp(size, num_rows, room.get());
    Team team;
#pragma omp parallel num_threads(num_threads) if (layers->mlp.gate_up.num_bytes() > WORTH_A_TEAM)
    {
        // Takes up what the part before has added, and gives the next one what it wants: `weight` is its norm's.
        auto go_on = [&](bool adds, const void* weight) {
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < num_rows; ++t) {
                T *row = x + t * hidden, *other = copy.get() + t * hidden;
                if (adds) add_row(row, other, hidden);
                if (weight) norm_row(row, (const T*)weight, step.eps, other, hidden);
            }
            team.meet();
        };
        go_on(false, layers->attention_norm);
        for (int64_t i = 0; i < num_layers; ++i) {
            const Layer& layer = layers[i];
            attention.run(team, copy.get(), hidden, layer.attention, copy.get());
            go_on(true, layer.mlp_norm);
            mlp.run(team, copy.get(), hidden, layer.mlp, copy.get());
            go_on(true, i + 1 < num_layers ? layers[i + 1].attention_norm : nullptr);
        }
    }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                                              \
    extern "C" void attend_whole_##SUFFIX(const T* x, int64_t x_stride, const AttentionPart* part, const Step* step,   \
                                          T* out, int64_t num_rows, int num_threads) {                                 \
        Space<T> room(Attends<T>::room(*step, num_rows));                                                              \
        Attends<T> attention(*step, num_rows, room.get());                                                             \
        Team team;                                                                                                     \
        _Pragma("omp parallel num_threads(num_threads) if (part->qkv.num_bytes() > WORTH_A_TEAM)")                     \
        attention.run(team, x, x_stride, *part, out);                                                                  \
    }                                                                                                                  \
    extern "C" void mlp_##SUFFIX(const T* x, int64_t x_stride, const MlpPart* part, T* out, int64_t num_rows,          \
                                 int num_threads) {                                                                    \
        Space<T> room(Gates<T>::room(part->down.size, num_rows));                                                      \
        Gates<T> mlp(part->down.size, num_rows, room.get());                                                           \
        Team team;                                                                                                     \
        _Pragma("omp parallel num_threads(num_threads) if (part->gate_up.num_bytes() > WORTH_A_TEAM)")                 \
        mlp.run(team, x, x_stride, *part, out);                                                                        \
    }                                                                                                                  \
    extern "C" void run_layers_##SUFFIX(const Layer* layers, int64_t num_layers, const Step* step, T* x,               \
                                        int64_t num_rows, int64_t hidden, int num_threads) {                           \
        run_layers(layers, num_layers, *step, x, num_rows, hidden, num_threads);                                       \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
