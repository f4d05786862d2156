// What the roles of the kernels in attention.cu and attention_fp8.cu share, and the producer's warps.
#pragma once
#include "common.cuh"

constexpr int QUERIES = 128;                   // of a tile
constexpr int KEYS = 128;                      // that are computed together
#ifndef KEY_BLOCK
#define KEY_BLOCK 128                          // keys of a listed block
#endif
constexpr int PARTS = KEYS / KEY_BLOCK;        // listed blocks that are computed together
static_assert(PARTS == 1 || PARTS == 2, "blocks of 128 or 64 keys");
constexpr int FULL = PARTS == 1 ? KEYS : KEY_BLOCK << 16 | KEY_BLOCK;  // length of blocks without padding
constexpr int THREADS = 384;
#ifdef EIGHT_BITS
constexpr bool IN_8_BITS = true;
#else
constexpr bool IN_8_BITS = false;
#endif
#ifdef SOFT
constexpr int MOST_CHUNKS = SOFT / KEYS;        // SOFT: the most key blocks of a call with soft blocks
constexpr int NO_ODD = -1, MANY_ODD = -2;
#endif
constexpr int ROW = IN_8_BITS ? 128 : 64;      // numbers that a row of shared memory holds
constexpr int HALVES = WIDTH / ROW;
constexpr uint32 HALF_BYTES = 128 * 128;       // a row of each of the queries, or keys
constexpr uint32 BLOCK_BYTES = HALVES * HALF_BYTES;
constexpr int SLOTS = 2;                       // tiles that are known at a time: the present and the next
constexpr int CONSUMER_WARPS = 8;
constexpr bool TWO_PRODUCERS = PARTS == 2;     // a warp for keys and one for values
constexpr int GATHER_WARPS = TWO_PRODUCERS ? 1 : 2;
constexpr int CONSUMER_REGISTERS = 232;
constexpr int PRODUCER_REGISTERS = 40;
constexpr float LN_2 = 0.6931471805599453f;
#define INFINITY_ __int_as_float(0x7F800000)

struct Arguments {
    TensorMap query, key, value, out;  // over (D, tokens, heads, batch); query and out only without an index
#ifdef SOFT
    TensorMap mean_key, mean_value;    // over (D, key blocks, heads, batch)
#endif
    const char* query_rows;            // (batch, tokens, heads, D) by strides; only with an index
    char* out_rows;                    // (batch, tokens, heads, value_dim), contiguous; only with an index
    float* lse;                        // (batch, heads, tokens)
    const int32* lists;
    const int32* whole;
    const int32* boundary;
    const int32* order;                // tiles in launch order
    const int32* key_lengths;
    const int64* index;
    int32* counter;                    // tiles handed out beyond the first of each program; null: every n-th tile
    int64 list_b, list_h, list_q, count_b, count_h, count_q, index_b, index_h, query_b, query_n, query_h;
    int32 heads, tokens, query_blocks, tiles, head_dim, value_dim;
    float scale_log2;
#ifdef EIGHT_BITS                      // query, key over slots instead of tokens, value over (slots, D, heads, batch)
    int32 key_blocks;
    const float* query_scale;          // (batch, heads, query_blocks)
    const float* key_scale;            // (batch, heads, key_blocks)
    const float* value_scale;          // (batch, heads, value_dim)
    const float* shift;                // (batch, heads, query slots), added to the log-sum-exp
#endif
#ifdef SOFT                            // blocks that a tile does not list enter its softmax as their means
    int32 chunks;                      // of `KEYS` means
    const float* mean_bias;            // (batch, heads, chunks * KEYS) by strides, what is added to their scores
    const int32* soft_heads;           // (heads): 0 where such blocks are dropped; null: nowhere
    int64 bias_b, bias_h;
#endif
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher's structure is another one");

// A tile, written by the scheduler warp for all others.
struct Tile {
    int32 batch, head, block, listed_blocks;
    int32 whole, real;                      // steps of `PARTS` blocks: without a test, and all; -1: no tile is left
    int32 listed[32], lengths[32];          // the first of them
    float factors[32];                      // of their scores, in 8 bits
#ifdef SOFT
    int32 chunks;                           // steps of means at the end, among `real`
    uint32 left_out[MOST_CHUNKS * KEYS / 32];  // a bit for every block that is listed, or has no keys
    float bias[MOST_CHUNKS];                // of the chunk's means,
    int32 odd[MOST_CHUNKS];                 // but for one, or NO_ODD, MANY_ODD
    float odd_bias[MOST_CHUNKS];            // which has so much more
#endif
};

struct Shared {
    uint64 ready[STAGES], free[STAGES];
    uint64 query_ready[SLOTS], query_free[SLOTS];
    uint64 tile_ready[SLOTS], tile_free[SLOTS];
    int32 lengths[STAGES];  // keys of the blocks in the ring, of the second one above 16 bits; ~chunk: means
    float factors[STAGES];  // and of their scores, in 8 bits
    int32 tokens[SLOTS][QUERIES];  // of the queries, -1 for padding; only with an index
    Tile tiles[SLOTS];
};

// Queries, two tiles of them; the ring; barriers.
extern __shared__ __align__(1024) unsigned char memory[];
constexpr uint32 RING = SLOTS * BLOCK_BYTES;
constexpr uint32 SHARED = RING + STAGES * BLOCK_BYTES;
static_assert(SHARED + sizeof(Shared) <= SHARED_BYTES, "the launcher asks for too little shared memory");

// A place in the ring, and the parity of its present phase.
struct Place {
    int stage;
    uint32 phase;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

__device__ __forceinline__ Shared& shared() { return *reinterpret_cast<Shared*>(memory + SHARED); }

// The tile in a slot, once the scheduler has written it.
__device__ __forceinline__ const Tile& await_tile(int slot, uint32 phase) {
    mbarrier_wait(shared_address(&shared().tile_ready[slot]), phase);
    return shared().tiles[slot];
}

// Waits for the keys or values at a place of the ring.
__device__ __forceinline__ void await(Place place) {
    mbarrier_wait(shared_address(&shared().ready[place.stage]), place.phase);
}

// Gives a place of the ring back: every warp says that it has read it.
__device__ __forceinline__ void give_back(int stage, int lane) {
    if (lane == 0) mbarrier_arrive(shared_address(&shared().free[stage]));
}

// ---- The producer's warps -------------------------------------------------------------------------------------------

// What scores of a query block with a key block are multiplied by. 8-bit numbers have a scale per block.
__device__ __forceinline__ float factor_of(const Arguments& arguments, int batch, int head, int block, int listed) {
#ifdef EIGHT_BITS
    const int64 row = static_cast<int64>(batch) * arguments.heads + head;
    return arguments.scale_log2 * arguments.query_scale[row * arguments.query_blocks + block] *
           arguments.key_scale[row * arguments.key_blocks + listed];
#else
    return arguments.scale_log2;
#endif
}

#ifdef SOFT
// What is added to the scores of a head's means, boiled down: blocks are equally long but for one or two, so that the
// consumers need not read a number for each of their columns. Starts the bits of what is left out.
__device__ __forceinline__ void boil_down(Tile& here, const float* bias, int chunks, int lane) {
    for (int chunk = 0; chunk < chunks; chunk++) {
        float mine[4], most = -INFINITY_;
#pragma unroll
        for (int u = 0; u < 4; u++) {
            mine[u] = bias[chunk * KEYS + u * 32 + lane];
            most = fmaxf(most, mine[u]);
        }
#pragma unroll
        for (int bit = 1; bit < 32; bit *= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFF, most, bit));
        int count = 0, odd = NO_ODD;
        float more = 0.0f;
#pragma unroll
        for (int u = 0; u < 4; u++) {
            const bool absent = mine[u] == -INFINITY_, differs = !absent && mine[u] != most;
            const uint32 empty = __ballot_sync(0xFFFFFFFF, absent), others = __ballot_sync(0xFFFFFFFF, differs);
            if (lane == 0) here.left_out[chunk * 4 + u] = empty;
            if (others) odd = u * 32 + __ffs(others) - 1;
            count += __popc(others);
            if (differs) more = mine[u] - most;
        }
        if (count == 1 && more != 0.0f) here.odd_bias[chunk] = more;
        if (lane == 0) {
            here.bias[chunk] = most;
            here.odd[chunk] = count > 1 ? MANY_ODD : odd;
        }
    }
}

// Notes which blocks a tile lists, and how many steps of means come after them.
__device__ __forceinline__ int mark(const Arguments& arguments, Tile& here, const int32* list, int listed, int batch,
                                    int head, int lane) {
    const bool soft = arguments.soft_heads == nullptr || arguments.soft_heads[head];
    if (lane == 0) here.chunks = soft ? arguments.chunks : 0;
    if (!soft) return 0;
    boil_down(here, arguments.mean_bias + batch * arguments.bias_b + head * arguments.bias_h, arguments.chunks, lane);
    __syncwarp();
    for (int i = lane; i < listed; i += 32) atomicOr(&here.left_out[list[i] / 32], 1u << list[i] % 32);
    return arguments.chunks;
}
#endif

// Writes the tiles of this program, one ahead of the consumers.
__device__ __forceinline__ void schedule(const Arguments& arguments, int lane) {
    int tile = blockIdx.x;
    for (uint32 round = 0;; round++) {
        const int slot = round % SLOTS;
        Tile& here = shared().tiles[slot];
        mbarrier_wait(shared_address(&shared().tile_free[slot]), (round / SLOTS & 1) ^ 1);
        const bool over = tile >= arguments.tiles;
        if (!over) {
            const int flat = arguments.order[tile];
            const int block = flat % arguments.query_blocks;
            const int head = flat / arguments.query_blocks % arguments.heads;
            const int batch = flat / arguments.query_blocks / arguments.heads;
            const int64 count = batch * arguments.count_b + head * arguments.count_h + block * arguments.count_q;
            const int whole = arguments.whole[count];
            const int real = whole + arguments.boundary[count];
            const int32* list =
                arguments.lists + batch * arguments.list_b + head * arguments.list_h + block * arguments.list_q;
            const int listed = lane < real ? list[lane] : 0;
            here.listed[lane] = listed;
            here.lengths[lane] = lane < real ? arguments.key_lengths[listed] : 0;
            if (IN_8_BITS) here.factors[lane] = lane < real ? factor_of(arguments, batch, head, block, listed) : 0.0f;
#ifdef SOFT
            const int chunks = mark(arguments, here, list, real, batch, head, lane);
#else
            const int chunks = 0;
#endif
            if (lane == 0) {
                here.batch = batch;
                here.head = head;
                here.block = block;
                here.listed_blocks = real;
                here.whole = whole / PARTS;
                here.real = (real + PARTS - 1) / PARTS + chunks;
            }
        } else if (lane == 0) {
            here.real = -1;
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&shared().tile_ready[slot]));
        if (over) return;
        if (arguments.counter == nullptr) {
            tile += gridDim.x;
        } else {
            if (lane == 0) tile = atomicAdd(arguments.counter, 1) + gridDim.x;
            tile = __shfl_sync(0xFFFFFFFF, tile, 0);
        }
    }
}

// Where the blocks of a step begin.
struct Begin {
    int first, second;
};

// Starts the copy of one step's blocks into the ring; c0, c1: where they begin in the map.
__device__ __forceinline__ void copy_block(const TensorMap* map, Place place, int c0, Begin c1, int head, int batch,
                                           int length, float factor) {
    const uint32 barrier = shared_address(&shared().ready[place.stage]);
    const uint32 target = shared_address(memory) + RING + place.stage * BLOCK_BYTES;
    mbarrier_wait(shared_address(&shared().free[place.stage]), place.phase ^ 1);
    shared().lengths[place.stage] = length;
    if (IN_8_BITS) shared().factors[place.stage] = factor;
    mbarrier_expect(barrier, BLOCK_BYTES);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        bulk_load(target + half * HALF_BYTES, map, barrier, c0 + half * ROW, c1.first, head, batch);
        if (PARTS == 2)
            bulk_load(target + half * HALF_BYTES + HALF_BYTES / 2, map, barrier, c0 + half * ROW, c1.second, head,
                      batch);
    }
}

// The same of a block of values, which lie along their channels in 8 bits.
__device__ __forceinline__ void copy_values(const Arguments& arguments, Place place, Begin row, int head,
                                            int batch) {
    copy_block(&arguments.value, place, IN_8_BITS ? row.first : 0, IN_8_BITS ? Begin{0, 0} : row, head, batch, 0, 0.0f);
}

#ifdef SOFT
// Copies the means after the listed blocks, in the same order: first come the values at `last`, those of the last
// listed block.
template <bool KEYS_TOO, bool VALUES_TOO>
__device__ __forceinline__ void produce_means(const Arguments& arguments, Place& place, Begin last, bool any_listed,
                                              int chunks, int head, int batch) {
#pragma unroll 1
    for (int i = 0; i <= chunks; i++) {
        if (i < chunks) {
            if (KEYS_TOO)
                copy_block(&arguments.mean_key, place, 0, {i * KEYS, i * KEYS + KEY_BLOCK}, head, batch, ~i, 0.0f);
            place.next();
        }
        if (i || any_listed) {
            const Begin row = i ? Begin{(i - 1) * KEYS, (i - 1) * KEYS + KEY_BLOCK} : last;
            if (VALUES_TOO)
                copy_block(i ? &arguments.mean_value : &arguments.value, place, 0, row, head, batch, 0, 0.0f);
            place.next();
        }
    }
}
#endif

// Copies keys and values, or one of them, in the order in which they are used: keys 0, keys 1, values 0, keys 2,
// values 1, ...
template <bool KEYS_TOO = true, bool VALUES_TOO = true>
__device__ __forceinline__ void produce(const Arguments& arguments, int lane) {
    Place place = {0, 0};
    for (uint32 round = 0;; round++) {
        const int slot = round % SLOTS;
        const uint32 phase = round / SLOTS & 1;
        const Tile& here = await_tile(slot, phase);
        const int real = here.real, batch = here.batch, head = here.head, block = here.block;
        const int blocks = here.listed_blocks;
#ifdef SOFT
        const int chunks = here.chunks;
#endif
        if (real < 0) return;
        // 32 entries of the list at a time, one per lane, the next ones on their way.
        int listed = here.listed[lane], length = here.lengths[lane], next_listed = 0, next_length = 0;
        float factor = IN_8_BITS ? here.factors[lane] : 0.0f, next_factor = 0.0f;
        const int32* list =
            arguments.lists + batch * arguments.list_b + head * arguments.list_h + block * arguments.list_q;
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(shared_address(&shared().tile_free[slot]));
            if (!PERMUTED && KEYS_TOO) {
                const uint32 barrier = shared_address(&shared().query_ready[slot]);
                mbarrier_wait(shared_address(&shared().query_free[slot]), phase ^ 1);
                mbarrier_expect(barrier, BLOCK_BYTES);
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    bulk_load(shared_address(memory) + slot * BLOCK_BYTES + half * HALF_BYTES, &arguments.query,
                              barrier, half * ROW, block * QUERIES, head, batch);
            }
        }
        Begin previous = {0, 0};
#pragma unroll 1
        for (int i = 0; i < blocks; i += PARTS) {
            if (i % 32 == 0) {
                if (i) {
                    listed = next_listed;
                    length = next_length;
                    factor = next_factor;
                }
                next_listed = i + 32 + lane < blocks ? list[i + 32 + lane] : 0;
            }
            if (i % 32 == 16) next_length = arguments.key_lengths[next_listed];
            if (IN_8_BITS && i % 32 == 16) next_factor = factor_of(arguments, batch, head, block, next_listed);
            Begin row = {__shfl_sync(0xFFFFFFFF, listed, i % 32) * KEY_BLOCK, 0};
            int found_length = __shfl_sync(0xFFFFFFFF, length, i % 32);
            if (PARTS == 2) {
                // A block without a second one stands in for it, with no key.
                const int second = __shfl_sync(0xFFFFFFFF, listed, (i + 1) % 32) * KEY_BLOCK;
                const int second_length = __shfl_sync(0xFFFFFFFF, length, (i + 1) % 32);
                row.second = i + 1 < blocks ? second : row.first;
                found_length |= i + 1 < blocks ? second_length << 16 : 0;
            }
            const float found_factor = IN_8_BITS ? __shfl_sync(0xFFFFFFFF, factor, i % 32) : 0.0f;
            if (lane == 0) {
                if (KEYS_TOO) copy_block(&arguments.key, place, 0, row, head, batch, found_length, found_factor);
                place.next();
                if (i) {
                    if (VALUES_TOO) copy_values(arguments, place, previous, head, batch);
                    place.next();
                }
                previous = row;
            }
        }
#ifdef SOFT
        if (lane == 0) produce_means<KEYS_TOO, VALUES_TOO>(arguments, place, previous, blocks > 0, chunks, head, batch);
#else
        if (lane == 0 && real) {
            if (VALUES_TOO) copy_values(arguments, place, previous, head, batch);
            place.next();
        }
#endif
        __syncwarp();
    }
}

// Reads the queries of the tiles through the index: their rows are shared out among the warps.
__device__ __forceinline__ void gather(const Arguments& arguments, int part, int lane) {
    constexpr int PIECES = WIDTH / 8;           // of 16 bytes in a row
    constexpr int ROWS = 32 / PIECES;           // rows at a time
    constexpr int SHARE = QUERIES / GATHER_WARPS;
    for (uint32 round = 0;; round++) {
        const int slot = round % SLOTS;
        const uint32 phase = round / SLOTS & 1;
        const Tile& here = await_tile(slot, phase);
        const int real = here.real, batch = here.batch, head = here.head, block = here.block;
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared_address(&shared().tile_free[slot]));
        if (real < 0) return;
        mbarrier_wait(shared_address(&shared().query_free[slot]), phase ^ 1);
        const int piece = lane % PIECES;
        const int64* index =
            arguments.index + batch * arguments.index_b + head * arguments.index_h + block * QUERIES + part * SHARE;
        // The consumers need them too, at the tile's end.
        int32* tokens = shared().tokens[slot] + part * SHARE;
#pragma unroll
        for (int row = lane; row < SHARE; row += 32) tokens[row] = static_cast<int32>(index[row]);
        __syncwarp();
        const char* source =
            arguments.query_rows + (batch * arguments.query_b + head * arguments.query_h) * 2 + piece * 16;
        const uint32 target = shared_address(memory) + slot * BLOCK_BYTES + piece / 8 * HALF_BYTES;
#pragma unroll 4
        for (int row = lane / PIECES; row < SHARE; row += ROWS) {
            const int64 token = tokens[row];
            const bool real_number = token >= 0 && piece * 8 < arguments.head_dim;
            const int place = part * SHARE + row;
            copy_16(target + place * 128 + (piece % 8 ^ place % 8) * 16,
                    source + (real_number ? token * arguments.query_n * 2 : -piece * 16), real_number ? 16 : 0);
        }
        copy_wait();
        fence_async_shared();
        mbarrier_arrive(shared_address(&shared().query_ready[slot]));
    }
}
