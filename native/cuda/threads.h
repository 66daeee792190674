// What cuda/kernels.cu expects of CUDA, made of threads of the CPU: those of a block run at once and meet at barriers.
// For sanitizers, which then see what a GPU does not tell: a barrier that is missing, and more shared memory than a
// launch gives. Blocks run one after the other.
#include <pthread.h>

#include <cmath>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline

namespace dijiang {
namespace cuda {
namespace {

constexpr int kLanes = 32;

struct Place {
  int x, y, z;
};

thread_local Place threadIdx, blockIdx;
Place blockDim;
// The shared memory of the block that runs.
float* room;

// Threads that wait for each other.
class Meeting {
 public:
  explicit Meeting(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Meeting() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// 32 threads that exchange numbers.
struct Warp {
  Meeting meeting{kLanes};
  float numbers[kLanes];
};

Meeting* all_of_block;
std::vector<std::unique_ptr<Warp>> warps;

void __syncthreads() { all_of_block->wait(); }

float __shfl_xor_sync(unsigned, float x, int far) {
  Warp& warp = *warps[threadIdx.x / kLanes];
  const int lane = threadIdx.x % kLanes;
  warp.numbers[lane] = x;
  warp.meeting.wait();
  const float found = warp.numbers[lane ^ far];
  warp.meeting.wait();
  return found;
}

// kernel() in every thread of every block; `floats`: shared memory, which holds NaN when a block begins.
template <class Kernel>
void launch_threads(Place grid, int threads, int floats, Kernel kernel) {
  Meeting meeting(threads);
  all_of_block = &meeting;
  blockDim = {threads, 1, 1};
  warps.clear();
  for (int lane = 0; lane < threads; lane += kLanes) warps.push_back(std::make_unique<Warp>());
  const int blocks = grid.x * grid.y * grid.z;
  std::unique_ptr<float[]> shared;
  const auto work = [&](int thread) {
    threadIdx = {thread, 0, 0};
    for (int i = 0; i < blocks; i++) {
      if (thread == 0) {
        shared.reset(new float[floats]);
        for (int j = 0; j < floats; j++) shared[j] = std::numeric_limits<float>::quiet_NaN();
        room = shared.get();
      }
      meeting.wait();
      blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      kernel();
      meeting.wait();
    }
  };
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; thread++) running.emplace_back(work, thread);
  for (std::thread& one : running) one.join();
}

}  // namespace
}  // namespace cuda
}  // namespace dijiang
