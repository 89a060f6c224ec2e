// CUTLASS's integer products on a GPU, as a shared library: y[m, n] = fp16(alpha * sum_k x[m, k] w[n, k]).
//
// x and w are int8 or int4 (two to a byte, the even column in the low half), along k; sums are int32. No activation is
// quantized here and no scale beyond alpha is applied: a rival's product alone. Several tiles are built; whoever calls
// times them and takes the fastest. Built by build.sh, called by src/abq_llm/evaluation/cutlass.py.

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>
#include <cutlass/version.h>

#include <string>

namespace {

struct Problem {
    int m, n, k, splits;  // splits: parts of k that different blocks sum
    float alpha;
    const void *x, *w;
    void *y, *workspace;  // workspace: zero before the first use, and only for this tile, m, n, k and splits
    cudaStream_t stream;
    size_t* workspace_bytes;  // if not null, say how large the workspace must be, and compute nothing
};

// `run` returns 0, or the cutlass::Status that says why not.
struct Tile {
    const char* name;
    int bits;
    int (*run)(const Problem&);
};

template <class Gemm>
int refuse_or_measure(const typename Gemm::Arguments& arguments, const Problem& problem) {
    if (problem.workspace_bytes) *problem.workspace_bytes = Gemm::get_workspace_size(arguments);
    return int(Gemm::can_implement(arguments));
}

// mma.sync with cp.async stages, CUTLASS 2: every GPU from sm_80 on. K is in elements, 16 bytes at least to a row.
template <class T, int M, int N, int K, int WarpM, int WarpN, int Stages>
int mma(const Problem& p) {
    using namespace cutlass;
    constexpr int bits = cutlass::sizeof_bits<T>::value;
    using Gemm = gemm::device::Gemm<
        T, layout::RowMajor, T, layout::ColumnMajor, half_t, layout::RowMajor, int32_t, arch::OpClassTensorOp, arch::Sm80,
        gemm::GemmShape<M, N, K>, gemm::GemmShape<WarpM, WarpN, K>, gemm::GemmShape<16, 8, 256 / bits>,
        epilogue::thread::LinearCombination<half_t, 8, int32_t, float>,
        gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, Stages, 128 / bits, 128 / bits, true,
        arch::OpMultiplyAddSaturate>;
    auto x = static_cast<const T*>(p.x), w = static_cast<const T*>(p.w);
    auto y = static_cast<half_t*>(p.y);
    typename Gemm::Arguments arguments(
        {p.m, p.n, p.k}, {x, p.k}, {w, p.k}, {y, p.n}, {y, p.n}, {p.alpha, 0.0f}, p.splits);
    int refused = refuse_or_measure<Gemm>(arguments, p);
    if (refused || p.workspace_bytes) return refused;
    // The kernel leaves its semaphores at zero, so only `initialize` of a new problem, not each product, clears them.
    static Gemm gemm;
    static Problem last{};
    bool same = last.m == p.m && last.n == p.n && last.k == p.k && last.splits == p.splits && last.workspace == p.workspace;
    Status status = same ? gemm.update(arguments, p.workspace) : gemm.initialize(arguments, p.workspace, p.stream);
    last = p;
    return int(status == Status::kSuccess ? gemm.run(p.stream) : status);
}

#ifdef HOPPER
// wgmma with TMA, CUTLASS 3. The tile's rows are the rows of w, so that few tokens do not waste a tile of 64 rows.
template <int N, int M, int K, class Cluster, class Schedule, class Scheduler>
int wgmma(const Problem& p) {
    using namespace cute;
    using namespace cutlass;
    using Shape3 = Shape<Int<N>, Int<M>, Int<K>>;
    constexpr bool cooperative = is_base_of_v<gemm::KernelTmaWarpSpecializedCooperative, Schedule>;
    using EpilogueSchedule = conditional_t<
        cooperative, epilogue::TmaWarpSpecializedCooperative, epilogue::TmaWarpSpecialized>;
    using Epilogue = typename epilogue::collective::CollectiveBuilder<
        arch::Sm90, arch::OpClassTensorOp, Shape3, Cluster, epilogue::collective::EpilogueTileAuto, int32_t, float, void,
        layout::ColumnMajor, 8, half_t, layout::ColumnMajor, 8, EpilogueSchedule>::CollectiveOp;
    using Mainloop = typename gemm::collective::CollectiveBuilder<
        arch::Sm90, arch::OpClassTensorOp, int8_t, layout::RowMajor, 16, int8_t, layout::ColumnMajor, 16, int32_t, Shape3,
        Cluster, gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
        Schedule>::CollectiveOp;
    using Kernel = gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue, Scheduler>;
    using Gemm = gemm::device::GemmUniversalAdapter<Kernel>;

    auto stride_w = make_cute_packed_stride(typename Kernel::StrideA{}, {p.n, p.k, 1});
    auto stride_x = make_cute_packed_stride(typename Kernel::StrideB{}, {p.m, p.k, 1});
    auto stride_y = make_cute_packed_stride(typename Kernel::StrideD{}, {p.n, p.m, 1});
    typename Gemm::Arguments arguments{
        gemm::GemmUniversalMode::kGemm,
        {p.n, p.m, p.k, 1},
        {static_cast<const int8_t*>(p.w), stride_w, static_cast<const int8_t*>(p.x), stride_x},
        {{p.alpha, 0.0f}, nullptr, {}, static_cast<half_t*>(p.y), stride_y}};
    if constexpr (is_same_v<Scheduler, gemm::StreamKScheduler>) arguments.scheduler.splits = p.splits;
    else if (p.splits != 1) return int(Status::kErrorInvalidProblem);
    int refused = refuse_or_measure<Gemm>(arguments, p);
    if (refused || p.workspace_bytes) return refused;
    Gemm gemm;
    return int(gemm.run(arguments, p.workspace, p.stream));
}

using Cluster1 = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Cluster2 = cute::Shape<cute::_2, cute::_1, cute::_1>;
using OneGroup = cutlass::gemm::KernelTmaWarpSpecialized;
using PingPong = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using Cooperative = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using Persistent = cutlass::gemm::PersistentScheduler;
using StreamK = cutlass::gemm::StreamKScheduler;
#endif

using s8 = int8_t;
using s4 = cutlass::int4b_t;

// Names: instruction, tokens x rows of the weight x k.
constexpr Tile TILES[] = {
    {"mma 32x64x128", 8, mma<s8, 32, 64, 128, 32, 32, 5>},
    {"mma 64x64x128", 8, mma<s8, 64, 64, 128, 32, 32, 4>},
    {"mma 128x128x64", 8, mma<s8, 128, 128, 64, 64, 64, 4>},
    {"mma 128x256x64", 8, mma<s8, 128, 256, 64, 64, 64, 3>},
    {"mma 32x64x256", 4, mma<s4, 32, 64, 256, 32, 32, 5>},
    {"mma 64x64x256", 4, mma<s4, 64, 64, 256, 32, 32, 4>},
    {"mma 128x128x128", 4, mma<s4, 128, 128, 128, 64, 64, 4>},
    {"mma 128x256x128", 4, mma<s4, 128, 256, 128, 64, 64, 3>},
#ifdef HOPPER
    {"wgmma 16x64x256", 8, wgmma<64, 16, 256, Cluster1, OneGroup, void>},
    {"wgmma 16x128x128 split", 8, wgmma<128, 16, 128, Cluster1, Cooperative, StreamK>},
    {"wgmma 64x64x128", 8, wgmma<64, 64, 128, Cluster1, PingPong, Persistent>},
    {"wgmma 128x128x128", 8, wgmma<128, 128, 128, Cluster2, PingPong, Persistent>},
    {"wgmma 256x128x128", 8, wgmma<128, 256, 128, Cluster2, Cooperative, Persistent>},
#endif
};

}  // namespace

extern "C" {

const char* cutlass_version() {
    static const std::string version = std::to_string(CUTLASS_MAJOR) + '.' + std::to_string(CUTLASS_MINOR) + '.' +
                                       std::to_string(CUTLASS_PATCH);
    return version.c_str();
}

int tiles() { return int(sizeof(TILES) / sizeof(Tile)); }

const char* tile_name(int tile) { return TILES[tile].name; }

int tile_bits(int tile) { return TILES[tile].bits; }

// Bytes of the workspace, or -1 if the tile cannot compute the problem.
long long workspace_bytes(int tile, int m, int n, int k, int splits) {
    size_t bytes = 0;
    int refused = TILES[tile].run({m, n, k, splits, 1, nullptr, nullptr, nullptr, nullptr, nullptr, &bytes});
    return refused ? -1 : (long long)bytes;
}

// x [m, k], w [n, k] -> y fp16 [m, n]. 0, or a cutlass::Status.
int run(int tile, int m, int n, int k, int splits, float alpha, const void* x, const void* w, void* y, void* workspace,
        void* stream) {
    return TILES[tile].run({m, n, k, splits, alpha, x, w, y, workspace, static_cast<cudaStream_t>(stream), nullptr});
}
}
