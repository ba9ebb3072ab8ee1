// Layers at once, or a half of one: few rows are computed faster than Python goes from kernel to kernel, and than threads
// are put to sleep and woken in between. To the last bit what the kernels give one after the other.
#include <algorithm>
#include <optional>

#include "attention.h"
#include "experts.h"
#include "pointwise.h"
#include "space.h"
#include "team.h"

namespace {

constexpr int64_t PART_OF_ROW = 1024;  // of a row's gates, that a thread takes at a time

// What follows is as `parts.py` lays it out.
struct Step {
    Sequences sequences;
    const void *cos, *sin;  // [all rows, dim / 2]
    const int64_t *slots;
    const int64_t* rows;  // that are passed on, rising; null: all, or none. Keys and values are stored of all
    const int64_t* positions;  // of those
    int64_t num_passed;
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

struct MoePart {
    Matrix router;
    ExpertsPart experts;
    const int64_t *places, *num_copies;  // by expert: of its copies, of which a token takes one by its position
    int64_t most_copies, first_place;    // of those that are here
    const int64_t* ids;                  // by slot
    int64_t* tokens;                     // by expert: how many were computed here
    int64_t top_k, renormalizes;
    const MlpPart* shared;  // null: none
    Matrix shared_gate;
};

struct Layer {
    const void* attention_norm;
    AttentionPart attention;
    const void* mlp_norm;
    MlpPart mlp;
    const MoePart* moe;  // null: an MLP
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

    // Of a team. `out`, of the rows that are passed on, may be x.
    void run(Team& team, const T* x, int64_t x_stride, const AttentionPart& part, T* out) {
        int64_t cached = 2 * step.kv_heads;
        multiply(team, x, x_stride, part.qkv, projected, num_rows);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < num_rows * cached; ++i) store(part, i / cached, i % cached);
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < step.num_passed * step.heads; ++i) ask(part, i / step.heads, i % step.heads);
        team.meet();
        over(part.keys, part.values).all(team, work);
        multiply(team, attended, step.heads * step.dim, part.o, out, step.num_passed);
    }

  private:
    Attention<T> over(const void* keys, const void* values) const {
        return {step.sequences, q,             step.heads * step.dim, (const T*)keys, (const T*)values,
                step.heads,     step.kv_heads, step.dim,              step.scale,     attended};
    }

    // Head h of row t, of first all keys', then all values', to its place in the cache.
    void store(const AttentionPart& part, int64_t t, int64_t h) const {
        int64_t kv_heads = step.kv_heads, dim = step.dim, cached = step.slots[t] * kv_heads * dim;
        T* from = projected + (t * num_heads + step.heads + h) * dim;
        if (h < kv_heads)
            rotate(from, (const T*)part.k_norm, t, (T*)part.keys + cached + h * dim);
        else
            std::memcpy((T*)part.values + cached + (h - kv_heads) * dim, from, dim * sizeof(T));
    }

    // Head h of the query that is number i of those that are passed on.
    void ask(const AttentionPart& part, int64_t i, int64_t h) const {
        int64_t t = step.rows ? step.rows[i] : i;
        rotate(projected + (t * num_heads + h) * step.dim, (const T*)part.q_norm, t, q + (i * step.heads + h) * step.dim);
    }

    void rotate(T* from, const T* norm, int64_t t, T* to) const {
        int64_t half = step.dim / 2;
        if (norm) norm_row(from, norm, step.eps, from, step.dim);
        rotate_row(from, (const T*)step.cos + t * half, (const T*)step.sin + t * half, to, step.dim);
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

// A sparse MLP, in room that is given: experts, and perhaps one that is shared.
template <class T>
class Moe {
  public:
    Moe(const MoePart& like, int64_t num_rows, T* room)
        : num_rows(num_rows),
          hidden(like.router.size),
          inside(room),
          shared(inside + inner_room(like, num_rows)),
          logits(shared + (like.shared ? num_rows * hidden : 0)),
          gates(logits + num_rows * like.router.out_size),
          experts(like.experts, num_rows, like.top_k, inside),
          slots(num_rows * like.top_k),
          weights(num_rows * like.top_k) {}

    static int64_t room(const MoePart& like, int64_t num_rows) {
        return inner_room(like, num_rows) + num_rows * ((like.shared ? like.router.size : 0) + like.router.out_size + 1);
    }

    // Of a team. `out` may be x.
    void run(Team& team, const T* x, int64_t x_stride, const MoePart& part, const int64_t* positions, T* out) {
        multiply(team, x, x_stride, part.router, logits, num_rows);
        route(part, positions);
        if (part.shared) {
            multiply(team, x, x_stride, part.shared_gate, gates, num_rows);
            Gates<T>(part.shared->down.size, num_rows, inside).run(team, x, x_stride, *part.shared, shared);
        }
        team.meet();
        if (omp_get_thread_num() == 0)
            for (int64_t i = 0; i < num_rows * part.top_k; ++i)
                if (slots.get()[i] >= 0) ++part.tokens[part.ids[slots.get()[i]]];
        experts.run(team, x, x_stride, slots.get(), weights.get(), part.experts, out);
        if (!part.shared) return;
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < num_rows; ++t) {
            f32x16 share = rounded<T>(1.0f / (1.0f + exponential(-fill(load_up_to_16(gates + t, 1)[0]))));
            for (int64_t i = t * hidden; i < (t + 1) * hidden; i += 16) {
                int64_t rest = (t + 1) * hidden - i;
                f32x16 v = rounded<T>(share * load_up_to_16(shared + i, rest));
                save_up_to_16(out + i, load_up_to_16(out + i, rest) + v, rest);
            }
        }
        team.meet();
    }

  private:
    // Of one of both parts at a time.
    static int64_t inner_room(const MoePart& like, int64_t num_rows) {
        int64_t routed = Experts<T>::room(like.experts, num_rows, like.top_k);
        return like.shared ? std::max(routed, Gates<T>::room(like.shared->down.size, num_rows)) : routed;
    }

    void route(const MoePart& part, const int64_t* positions) {
        int64_t num_experts = part.router.out_size, count = part.experts.down.count;
        std::vector<float> room(num_experts + 16);
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < num_rows; ++t) {
            int64_t* own = slots.get() + t * part.top_k;
            route_row(logits + t * num_experts, num_experts, part.top_k, part.renormalizes, room.data(), own,
                      weights.get() + t * part.top_k);
            for (int64_t c = 0; c < part.top_k; ++c) {
                int64_t copy = positions[t] % part.num_copies[own[c]];
                int64_t slot = part.places[own[c] * part.most_copies + copy] - part.first_place;
                own[c] = 0 <= slot && slot < count ? slot : -1;
            }
        }
    }

    int64_t num_rows, hidden;
    T *inside, *shared, *logits, *gates;
    Experts<T> experts;
    Space<int64_t> slots;
    Space<float> weights;
};

// x [num_rows, hidden] becomes what it is behind the layers, in those rows that the last one, of which `last` is,
// passes on; where those are all, that is `step` itself. Beside it there are one more copy, which is what a part is
// given and then what it adds, and the room of the larger part: what the planner counts.
template <class T>
void run_layers(const Layer* layers, int64_t num_layers, const Step& step, const Step& last, T* x, int64_t num_rows,
                int64_t hidden, int num_threads) {
    int64_t most = Attends<T>::room(step, num_rows), num_bytes = 0;
    const MoePart* sparse = nullptr;
    for (int64_t i = 0; i < num_layers; ++i) {
        const MoePart* moe = layers[i].moe;
        most = std::max(most, moe ? Moe<T>::room(*moe, num_rows) : Gates<T>::room(layers[i].mlp.down.size, num_rows));
        const Matrix& large = moe ? moe->experts.gate_up.first : layers[i].mlp.gate_up;
        num_bytes = std::max(num_bytes, large.num_bytes() * (moe ? moe->top_k : 1));
        if (moe) sparse = moe;
    }
    Space<T> room(most), copy(num_rows * hidden);
    bool is_apart = &last != &step;
    std::optional<Attends<T>> attention, last_attention;
    std::optional<Moe<T>> moe, last_moe;
    attention.emplace(step, num_rows, room.get());
    if (is_apart) last_attention.emplace(last, num_rows, room.get());
    if (sparse) moe.emplace(*sparse, num_rows, room.get());
    if (sparse && is_apart) last_moe.emplace(*sparse, last.num_passed, room.get());
    Team team;
#pragma omp parallel num_threads(num_threads) if (num_bytes > WORTH_A_TEAM)
    {
        // Takes up what the part before has added, and gives the next one what it wants: `weight` is its norm's.
        auto go_on = [&](bool adds, const void* weight, const int64_t* rows, int64_t count) {
#pragma omp for schedule(static) nowait
            for (int64_t t = 0; t < count; ++t) {
                T *row = x + (rows ? rows[t] : t) * hidden, *other = copy.get() + t * hidden;
                if (adds) add_row(row, other, hidden);
                if (weight) norm_row(row, (const T*)weight, step.eps, other, hidden);
            }
            team.meet();
        };
        go_on(false, layers->attention_norm, nullptr, num_rows);
        for (int64_t i = 0; i < num_layers; ++i) {
            const Layer& layer = layers[i];
            bool is_other = is_apart && i + 1 == num_layers;
            const Step& own = is_other ? last : step;
            int64_t count = own.num_passed;
            (is_other ? last_attention : attention)->run(team, copy.get(), hidden, layer.attention, copy.get());
            go_on(true, layer.mlp_norm, own.rows, count);
            if (layer.moe)
                (is_other ? last_moe : moe)->run(team, copy.get(), hidden, *layer.moe, own.positions, copy.get());
            else
                Gates<T>(layer.mlp.down.size, count, room.get()).run(team, copy.get(), hidden, layer.mlp, copy.get());
            go_on(true, i + 1 < num_layers ? layers[i + 1].attention_norm : nullptr, own.rows, count);
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
    extern "C" void moe_##SUFFIX(const T* x, int64_t x_stride, const MoePart* part, const int64_t* positions, T* out,   \
                                 int64_t num_rows, int num_threads) {                                                  \
        Space<T> room(Moe<T>::room(*part, num_rows));                                                                  \
        Moe<T> moe(*part, num_rows, room.get());                                                                       \
        Team team;                                                                                                     \
        int64_t num_bytes = part->experts.gate_up.first.num_bytes() * part->top_k;                                     \
        _Pragma("omp parallel num_threads(num_threads) if (num_bytes > WORTH_A_TEAM)")                                 \
        moe.run(team, x, x_stride, *part, positions, out);                                                             \
    }                                                                                                                  \
    extern "C" void run_layers_##SUFFIX(const Layer* layers, int64_t num_layers, const Step* step, const Step* last,   \
                                        T* x, int64_t num_rows, int64_t hidden, int num_threads) {                     \
        run_layers(layers, num_layers, *step, *last, x, num_rows, hidden, num_threads);                                \
    }
EXPORT(float, f32)
EXPORT(bf16, bf16)
