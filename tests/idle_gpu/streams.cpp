// Streams, events and graphs. All work is done at once, in whatever stream, so the order of streams is not checked. A
// stream that is captured records instead, and what CUDA forbids meanwhile is refused: waiting for the stream, and by
// the mode of the capture what may wait somewhere. A graph's launch repeats its copies and fills.
#include <atomic>
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "device.h"

namespace {
using namespace idle_gpu;
using Graph = std::vector<std::function<void()>>;  // empty functions are kernels

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  Graph graph;
  bool valid;
};
struct Event {
  double ms = -1;  // negative: never recorded
  unsigned long long capture = 0;
};

std::mutex mutex;
std::map<cudaStream_t, std::shared_ptr<Capture>> captures;  // by every stream that belongs to one
std::atomic<bool> capturing{false};                         // whether there is any
std::atomic<long> launches{0};
std::atomic<unsigned long long> handles{0x1000};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

std::shared_ptr<Capture> capture_of(cudaStream_t stream) {
  if (!capturing) return nullptr;
  std::lock_guard<std::mutex> guard(mutex);
  auto found = captures.find(stream);
  return found == captures.end() ? nullptr : found->second;
}

Event& event_of(cudaEvent_t event) { return *reinterpret_cast<Event*>(event); }

double now_ms() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) * 1e-6;
}
}  // namespace

namespace idle_gpu {
cudaError_t perform(cudaStream_t stream, std::function<void()> work) {
  if (!work) ++launches;
  if (std::shared_ptr<Capture> capture = capture_of(stream)) {
    capture->graph.push_back(std::move(work));
  } else if (work) {
    work();
  }
  return cudaSuccess;
}

cudaError_t wait_for(cudaStream_t stream) {
  std::shared_ptr<Capture> capture = capture_of(stream);
  if (!capture) return cudaSuccess;
  capture->valid = false;
  return fail(cudaErrorStreamCaptureUnsupported);
}

bool forbidden_by_capture() {
  if (!capturing || thread_mode == cudaStreamCaptureModeRelaxed) return false;
  std::lock_guard<std::mutex> guard(mutex);
  for (auto& [stream, capture] : captures) {
    bool own = capture->thread == std::this_thread::get_id();
    bool global = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    if (own ? capture->mode != cudaStreamCaptureModeRelaxed : global) return true;
  }
  return false;
}
}  // namespace idle_gpu

extern "C" {
long idle_gpu_launches() { return launches; }
// cuBLAS's handle knows the stream; here the thread's own capture stands for it.
void idle_gpu_count_product() {
  ++launches;
  if (!capturing) return;
  std::lock_guard<std::mutex> guard(mutex);
  for (auto& [stream, capture] : captures)
    if (capture->thread == std::this_thread::get_id()) return capture->graph.push_back(nullptr);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return *stream = reinterpret_cast<cudaStream_t>(handles += 16), cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for(stream); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return wait_for(stream); }
cudaError_t cudaDeviceSynchronize() { return capturing ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete &event_of(event), cudaSuccess; }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  std::shared_ptr<Capture> capture = capture_of(stream);
  return event_of(event) = {now_ms(), capture ? capture->id : 0}, cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return event_of(event).capture ? fail(cudaErrorCapturedEvent) : cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  const Event &a = event_of(begin), &b = event_of(end);
  if (a.ms < 0 || b.ms < 0 || a.capture || b.capture) return fail(cudaErrorInvalidResourceHandle);
  return *ms = static_cast<float>(b.ms - a.ms), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (!capturing) return cudaSuccess;
  std::lock_guard<std::mutex> guard(mutex);
  for (auto& [captured, capture] : captures)
    if (capture->id == event_of(event).capture) {
      captures[stream] = capture;  // it joins the capture it waits for
      break;
    }
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, thread_mode), cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  std::lock_guard<std::mutex> guard(mutex);
  if (stream == nullptr || captures.count(stream)) return fail(cudaErrorStreamCaptureUnsupported);
  Capture capture{handles += 16, mode, std::this_thread::get_id(), {}, true};
  captures[stream] = std::make_shared<Capture>(std::move(capture));
  return capturing = true, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  std::shared_ptr<Capture> capture = capture_of(stream);
  if (!capture) return fail(cudaErrorStreamCaptureUnmatched);
  std::lock_guard<std::mutex> guard(mutex);
  for (auto entry = captures.begin(); entry != captures.end();)
    entry = entry->second == capture ? captures.erase(entry) : std::next(entry);
  capturing = !captures.empty();
  if (!capture->valid) return fail(cudaErrorStreamCaptureInvalidated);
  return *graph = reinterpret_cast<cudaGraph_t>(new Graph(std::move(capture->graph))), cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  std::shared_ptr<Capture> capture = capture_of(stream);
  *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (capture && !capture->valid) *status = cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** before,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  std::shared_ptr<Capture> capture = capture_of(stream);
  if (id && capture) *id = capture->id;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(&capture->graph) : nullptr;
  if (before) *before = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) return fail(cudaErrorNotSupported);
  return *count = reinterpret_cast<Graph*>(graph)->size(), cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long) {
  return *to = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph))), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  for (auto& node : *reinterpret_cast<Graph*>(graph)) perform(stream, node);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<Graph*>(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete reinterpret_cast<Graph*>(graph), cudaSuccess; }
}
