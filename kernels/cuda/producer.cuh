// What the roles of the kernel in attention.cu share, and the producer's warps.
#pragma once
#include "common.cuh"

constexpr int QUERIES = 128;                   // of a tile
constexpr int KEYS = 128;                      // of a block
constexpr int THREADS = 384;
constexpr int HALVES = WIDTH / 64;             // a row of shared memory holds 64 numbers
constexpr uint32 HALF_BYTES = 128 * 128;       // 64 numbers of each of the queries, or keys
constexpr uint32 BLOCK_BYTES = HALVES * HALF_BYTES;
constexpr int SLOTS = 2;                       // tiles that are known at a time: the present and the next
constexpr int CONSUMER_WARPS = 8;
constexpr int GATHER_WARPS = 2;
constexpr int CONSUMER_REGISTERS = 232;
constexpr int PRODUCER_REGISTERS = 40;
constexpr float LN_2 = 0.6931471805599453f;
#define INFINITY_ __int_as_float(0x7F800000)

struct Arguments {
    TensorMap query, key, value, out;  // over (D, tokens, heads, batch); query and out only without an index
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
};

static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher's structure is another one");

// A tile, written by the scheduler warp for all others.
struct Tile {
    int32 batch, head, block, whole, real;  // real: listed blocks, -1: no tile is left
    int32 listed[32], lengths[32];          // the first of them
};

struct Shared {
    uint64 ready[STAGES], free[STAGES];
    uint64 query_ready[SLOTS], query_free[SLOTS];
    uint64 tile_ready[SLOTS], tile_free[SLOTS];
    int32 lengths[STAGES];  // keys of the blocks in the ring
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

// ---- The producer's warps -------------------------------------------------------------------------------------------

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
            if (lane == 0) {
                here.batch = batch;
                here.head = head;
                here.block = block;
                here.whole = whole;
                here.real = real;
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

// Starts the copy of one block into the ring.
__device__ __forceinline__ void copy_block(const TensorMap* map, Place place, int row, int head, int batch,
                                           int length) {
    const uint32 barrier = shared_address(&shared().ready[place.stage]);
    const uint32 target = shared_address(memory) + RING + place.stage * BLOCK_BYTES;
    mbarrier_wait(shared_address(&shared().free[place.stage]), place.phase ^ 1);
    shared().lengths[place.stage] = length;
    mbarrier_expect(barrier, BLOCK_BYTES);
#pragma unroll
    for (int half = 0; half < HALVES; half++)
        bulk_load(target + half * HALF_BYTES, map, barrier, half * 64, row, head, batch);
}

// Copies keys and values, in the order in which they are used: keys 0, keys 1, values 0, keys 2, values 1, ...
__device__ __forceinline__ void produce(const Arguments& arguments, int lane) {
    Place place = {0, 0};
    for (uint32 round = 0;; round++) {
        const int slot = round % SLOTS;
        const uint32 phase = round / SLOTS & 1;
        const Tile& here = await_tile(slot, phase);
        const int real = here.real, batch = here.batch, head = here.head, block = here.block;
        if (real < 0) return;
        // 32 entries of the list at a time, one per lane, the next ones on their way.
        int listed = here.listed[lane], length = here.lengths[lane], next_listed = 0, next_length = 0;
        const int32* list =
            arguments.lists + batch * arguments.list_b + head * arguments.list_h + block * arguments.list_q;
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive(shared_address(&shared().tile_free[slot]));
            if (!PERMUTED) {
                const uint32 barrier = shared_address(&shared().query_ready[slot]);
                mbarrier_wait(shared_address(&shared().query_free[slot]), phase ^ 1);
                mbarrier_expect(barrier, BLOCK_BYTES);
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    bulk_load(shared_address(memory) + slot * BLOCK_BYTES + half * HALF_BYTES, &arguments.query,
                              barrier, half * 64, block * QUERIES, head, batch);
            }
        }
        int previous = 0;
#pragma unroll 1
        for (int i = 0; i < real; i++) {
            if (i % 32 == 0) {
                if (i) {
                    listed = next_listed;
                    length = next_length;
                }
                next_listed = i + 32 + lane < real ? list[i + 32 + lane] : 0;
            }
            if (i % 32 == 16) next_length = arguments.key_lengths[next_listed];
            const int row = __shfl_sync(0xFFFFFFFF, listed, i % 32) * KEYS;
            const int found_length = __shfl_sync(0xFFFFFFFF, length, i % 32);
            if (lane == 0) {
                copy_block(&arguments.key, place, row, head, batch, found_length);
                place.next();
                if (i) {
                    copy_block(&arguments.value, place, previous, head, batch, 0);
                    place.next();
                }
                previous = row;
            }
        }
        if (lane == 0 && real) {
            copy_block(&arguments.value, place, previous, head, batch, 0);
            place.next();
        }
        __syncwarp();
    }
}

// Reads the queries of the tiles through the index: 64 rows by each of two warps.
__device__ __forceinline__ void gather(const Arguments& arguments, int part, int lane) {
    constexpr int PIECES = WIDTH / 8;           // of 16 bytes in a row
    constexpr int ROWS = 32 / PIECES;           // rows at a time
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
            arguments.index + batch * arguments.index_b + head * arguments.index_h + block * QUERIES + part * 64;
        const char* source =
            arguments.query_rows + (batch * arguments.query_b + head * arguments.query_h) * 2 + piece * 16;
        const uint32 target = shared_address(memory) + slot * BLOCK_BYTES + piece / 8 * HALF_BYTES;
#pragma unroll 4
        for (int row = lane / PIECES; row < 64; row += ROWS) {
            const int64 token = index[row];  // -1 is padding
            const bool real_number = token >= 0 && piece * 8 < arguments.head_dim;
            const int place = part * 64 + row;
            copy_16(target + place * 128 + (piece % 8 ^ place % 8) * 16,
                    source + (real_number ? token * arguments.query_n * 2 : -piece * 16), real_number ? 16 : 0);
        }
        copy_wait();
        fence_async_shared();
        mbarrier_arrive(shared_address(&shared().query_ready[slot]));
    }
}
