// What xxhash's xxh3_64 (seed 0) gives for each of some blocks of memory whose sizes are multiples of 64 KiB, by one thread block for each.
//
// The hash is a chain over pieces of 1 KiB, but what a piece adds to the eight accumulators does not depend on those before it. So eight warps find that
// for a tile of 64 pieces while a ninth one goes along the chain of the tile before. The chain is what takes the time, so several blocks are hashed at
// once. A launch costs the host as much as several copies do, so they have one together.
//
// xxh3.ptx is made from this file: make kernels

typedef unsigned long long u64;
typedef unsigned int u32;

#define BLOCKS 8
#define RANGES 16
#define WARPS 8
#define PIECES 64
#define PIECE 1024

struct Block {
    u64 size;
    u64 end[RANGES];   // of each range, in bytes from the block's begin
    u64 base[RANGES];  // its address, less the bytes of the block before it
};

struct Blocks {
    Block block[BLOCKS];
};

__constant__ const u64 SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull, 0x1f67b3b7a4a44072ull,
    0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull, 0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull,
    0xcb00c391bb52283cull, 0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull, 0x647378d9c97e9fc8ull,
    0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull, 0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull,
    0xfca1477d58be162bull, 0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};
__constant__ const u64 LAST[8] = {
    0xea647378d9c97e9full, 0xc5c3ebd33483acc5ull, 0x17eb6313faffa081ull, 0xd349daf0b751dd0dull,
    0x2b9e68d429265516ull, 0x8ffca1477d58be16ull, 0x45ce31d07ad1b8f8ull, 0xaf280416958f3acbull,
};
__constant__ const u64 MERGE[8] = {
    0x6dd4de1cad21f72cull, 0xa44072db979083e9ull, 0xe679cb1f67b3b7a4ull, 0xd05a8278e5c0cc4eull,
    0x4608b82172ffcc7dull, 0x9035e08e2443f774ull, 0x52283c4c263a81e6ull, 0x65d088cb00c391bbull,
};
__constant__ const u64 START[8] = {
    0xC2B2AE3Dull, 0x9E3779B185EBCA87ull, 0xC2B2AE3D27D4EB4Full, 0x165667B19E3779F9ull,
    0x85EBCA77C2B2AE63ull, 0x85EBCA77ull, 0x27D4EB2F165667C5ull, 0x9E3779B1ull,
};

__device__ __forceinline__ u64 folded(u64 value, u64 key)
{
    u64 mixed = value ^ key;
    return (u64)(u32)mixed * (mixed >> 32);
}

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1)) gms_xxh3_64(const __grid_constant__ Blocks blocks, u64* found)
{
    __shared__ u64 sums[2][PIECES][8];
    const Block& block = blocks.block[blockIdx.x];
    const u64 size = block.size;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 pieces = size / PIECE, tiles = pieces / PIECES;
    const u32 pair = lane % 4 * 2, stripe = lane / 4;
    const u64 key0 = SECRET[stripe + pair], key1 = SECRET[stripe + pair + 1];
    const u64 key2 = SECRET[stripe + 8 + pair], key3 = SECRET[stripe + 8 + pair + 1];
    const u64 scramble = SECRET[16 + lane % 8];
    u64 sum = START[lane % 8];
    u32 range = 0;
    for (u64 tile = 0; tile <= tiles; tile++) {
        if (warp < WARPS && tile < tiles) {
            while (tile * PIECES * PIECE >= block.end[range])
                range++;
            const ulonglong2* from = (const ulonglong2*)(block.base[range] + tile * PIECES * PIECE + warp * PIECE);
            ulonglong2 first[PIECES / WARPS], second[PIECES / WARPS];
#pragma unroll
            for (u32 n = 0; n < PIECES / WARPS; n++) {
                first[n] = from[n * WARPS * (PIECE / 16) + lane];
                second[n] = from[n * WARPS * (PIECE / 16) + lane + 32];
            }
#pragma unroll
            for (u32 n = 0; n < PIECES / WARPS; n++) {
                const u32 number = n * WARPS + warp;
                u64 late0 = key2, late1 = key3;
                if (stripe == 7 && tile * PIECES + number == pieces - 1) {  // the last stripe of all
                    late0 = LAST[pair];
                    late1 = LAST[pair + 1];
                }
                u64 even = folded(first[n].x, key0) + first[n].y + folded(second[n].x, late0) + second[n].y;
                u64 odd = folded(first[n].y, key1) + first[n].x + folded(second[n].y, late1) + second[n].x;
#pragma unroll
                for (u32 apart = 4; apart < 32; apart *= 2) {
                    even += __shfl_xor_sync(0xFFFFFFFFu, even, apart);
                    odd += __shfl_xor_sync(0xFFFFFFFFu, odd, apart);
                }
                if (lane < 4) {
                    sums[tile % 2][number][pair] = even;
                    sums[tile % 2][number][pair + 1] = odd;
                }
            }
        }
        if (warp == WARPS && tile > 0) {
            const u64 left = tile == tiles ? PIECES - 1 : PIECES;
#pragma unroll 8
            for (u32 n = 0; n < left; n++) {
                sum += sums[(tile - 1) % 2][n][lane % 8];
                sum = (sum ^ sum >> 47 ^ scramble) * 0x9E3779B1ull;
            }
            if (tile == tiles)
                sum += sums[(tile - 1) % 2][PIECES - 1][lane % 8];
        }
        __syncthreads();
    }
    if (warp == WARPS) {
        sum ^= MERGE[lane % 8];
        const u64 other = __shfl_xor_sync(0xFFFFFFFFu, sum, 1);
        u64 product = sum * other ^ __umul64hi(sum, other);
        product += __shfl_xor_sync(0xFFFFFFFFu, product, 2);
        product += __shfl_xor_sync(0xFFFFFFFFu, product, 4);
        if (lane == 0) {
            u64 hash = size * 0x9E3779B185EBCA87ull + product;
            hash = (hash ^ hash >> 37) * 0x165667919E3779F9ull;
            found[blockIdx.x] = hash ^ hash >> 32;
        }
    }
}
