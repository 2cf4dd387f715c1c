// What tch does not expose of libtorch, as a C interface for hvd-torch.
//
// A tensor crosses as tch's `C_tensor *`, which is an `at::Tensor *`. The shim borrows the tensors that it is given;
// one that it returns is owned by the caller (tch frees it). A function that can fail returns 0 for success and
// -1 for failure; `hvd_shim_error` then gives the reason, per thread. No C++ exception leaves this file.

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

using at::Tensor;

namespace {

thread_local std::string last_error;

// Runs `body`; turns an exception into -1 and a message.
template <typename Body>
int guarded(Body body) noexcept {
  try {
    body();
    return 0;
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an exception of unknown type";
  }
  return -1;
}

// Shallow copies of `count` borrowed tensors.
std::vector<Tensor> gather(Tensor* const* tensors, size_t count) {
  std::vector<Tensor> result;
  result.reserve(count);
  for (size_t i = 0; i < count; i++) result.push_back(*tensors[i]);
  return result;
}

using HookCall = void (*)(void* context);
using HookDrop = void (*)(void* context);

// Calls back after a leaf's `.grad` has been accumulated. Owns `context`.
struct PostAccumulateHook final : torch::autograd::PostAccumulateGradHook {
  HookCall call;
  HookDrop drop;
  void* context;
  // What becomes the gradient where one begins; none where it does not matter.
  Tensor place;

  PostAccumulateHook(HookCall call, HookDrop drop, void* context) : call(call), drop(drop), context(context) {}
  PostAccumulateHook(const PostAccumulateHook&) = delete;
  PostAccumulateHook& operator=(const PostAccumulateHook&) = delete;
  ~PostAccumulateHook() override { drop(context); }

  void operator()(const torch::autograd::Variable&) override { call(context); }
};

// The hook of `leaf`; null where it has none of ours.
PostAccumulateHook* hook_of(const Tensor& leaf) {
  return dynamic_cast<PostAccumulateHook*>(torch::autograd::impl::post_acc_grad_hooks(leaf).get());
}

// Gets the gradients of a function's results; gives those of its inputs, each a new tensor or null for none.
using BackwardCall = int (*)(void* context, Tensor* const* grads, size_t results, Tensor** input_grads, size_t inputs);

// A function whose backward pass calls back. Owns `context`.
struct CallbackNode final : torch::autograd::Node {
  BackwardCall call;
  HookDrop drop;
  void* context;  // null once a backward pass that does not retain the graph has come by

  CallbackNode(BackwardCall call, HookDrop drop, void* context) : call(call), drop(drop), context(context) {}
  CallbackNode(const CallbackNode&) = delete;
  CallbackNode& operator=(const CallbackNode&) = delete;
  ~CallbackNode() override { release_variables(); }

  std::string name() const override { return "HvdBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    if (context) drop(context);
    context = nullptr;
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(context, "a second backward pass through a graph that the first did not retain");
    // A result that nothing was computed from has no gradient: all ranks must take part with something.
    for (size_t i = 0; i < grads.size(); i++)
      if (!grads[i].defined()) grads[i] = input_metadata(i).zeros_like();
    std::vector<Tensor*> given;
    for (Tensor& grad : grads) given.push_back(&grad);
    std::vector<Tensor*> made(num_outputs(), nullptr);
    const int status = call(context, given.data(), given.size(), made.data(), made.size());
    torch::autograd::variable_list result;
    for (Tensor* grad : made) {
      result.push_back(grad ? *grad : Tensor());
      delete grad;
    }
    TORCH_CHECK(status == 0, last_error);
    return result;
  }
};

// Elements whose squares are summed by one thread at a time. Fixed, so that the order of summation does not depend on
// the number of threads.
constexpr int64_t kBlock = 1 << 14;
// Independent partial sums within a block. Fixed, so that the order does not depend on the processor's vector width.
constexpr int64_t kLanes = 16;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HVD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HVD_CLONES
#endif

HVD_CLONES double sum_of_squares_f32(const float* data, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const double value = data[i + lane];
      lanes[lane] += value * value;
    }
  for (int64_t lane = 0; i + lane < count; lane++) lanes[lane] += double(data[i + lane]) * double(data[i + lane]);
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <typename T>
double sum_of_squares(const T* data, int64_t count) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < count; i++) {
    const double value = static_cast<double>(data[i]);
    lanes[i % kLanes] += value * value;
  }
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

double sum_of_squares(const float* data, int64_t count) { return sum_of_squares_f32(data, count); }

template <typename T>
double blocked_sum_of_squares(const Tensor& flat) {
  const T* data = flat.const_data_ptr<T>();
  const int64_t count = flat.numel(), blocks = (count + kBlock - 1) / kBlock;
  std::vector<double> partial(blocks);
  at::parallel_for(0, blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++)
      partial[b] = sum_of_squares(data + b * kBlock, std::min(kBlock, count - b * kBlock));
  });
  double sum = 0;
  for (double part : partial) sum += part;
  return sum;
}

double squared_norm(const Tensor& flat) {
  if (!flat.is_cpu()) return at::sum(at::square(flat.to(at::kDouble))).item<double>();
  TORCH_CHECK(flat.is_contiguous(), "the squared norm is taken of contiguous tensors only");
  switch (flat.scalar_type()) {
    case at::kFloat: return blocked_sum_of_squares<float>(flat);
    case at::kDouble: return blocked_sum_of_squares<double>(flat);
    case at::kBFloat16: return blocked_sum_of_squares<at::BFloat16>(flat);
    case at::kHalf: return blocked_sum_of_squares<at::Half>(flat);
    default: TORCH_CHECK(false, "no norm of gradients of type ", flat.scalar_type());
  }
}

c10::DeviceType device_type(int cuda) { return cuda ? at::kCUDA : at::kCPU; }

}  // namespace

extern "C" {

// Why the last call on this thread failed.
const char* hvd_shim_error() { return last_error.c_str(); }

// --- hooks and gradients ---

// Calls `call(context)` each time that a backward pass has accumulated into `leaf`'s gradient. `drop(context)` runs
// when the hook goes: with the tensor, by hvd_hook_remove, or at once if this call fails. A tensor has at most one such
// hook; a second is refused.
int hvd_hook_set(Tensor* leaf, HookCall call, HookDrop drop, void* context) {
  return guarded([&] {
    auto hook = std::make_unique<PostAccumulateHook>(call, drop, context);
    TORCH_CHECK(leaf->is_leaf() && leaf->requires_grad(), "only a leaf that requires a gradient can have a hook");
    TORCH_CHECK(!torch::autograd::impl::post_acc_grad_hooks(*leaf), "this tensor already has a hook");
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf, std::move(hook));
  });
}

int hvd_hook_remove(Tensor* leaf) {
  return guarded([&] { torch::autograd::impl::set_post_acc_grad_hooks(*leaf, nullptr); });
}

// Where the gradient's elements are: null if there is no gradient, or one that is sparse.
int hvd_grad_data(Tensor* leaf, void** data) {
  return guarded([&] {
    const Tensor& grad = leaf->grad();
    *data = grad.defined() && grad.layout() == at::kStrided ? grad.mutable_data_ptr() : nullptr;
  });
}

// Whether the tensor has a gradient, of any layout.
int hvd_grad_defined(Tensor* leaf, int* defined) {
  return guarded([&] { *defined = leaf->grad().defined(); });
}

// Makes `grad` the gradient of `leaf`; null for none.
int hvd_grad_set(Tensor* leaf, Tensor* grad) {
  return guarded([&] { leaf->mutable_grad() = grad ? *grad : Tensor(); });
}

// Has hvd_grad_begin make `place` the gradient of `leaf`, which has a hook.
int hvd_grad_place(Tensor* leaf, Tensor* place) {
  return guarded([&] {
    PostAccumulateHook* hook = hook_of(*leaf);
    TORCH_CHECK(hook, "only a tensor with a hook can say where its gradient begins");
    hook->place = *place;
  });
}

// Gives `leaf` a gradient of any values where it has none, and says whether it did.
int hvd_grad_begin(Tensor* leaf, int* begins) {
  return guarded([&] {
    *begins = !leaf->grad().defined();
    if (!*begins) return;
    PostAccumulateHook* hook = hook_of(*leaf);
    at::NoGradGuard no_grad;
    leaf->mutable_grad() = hook && hook->place.defined() ? hook->place : at::empty_like(*leaf, at::MemoryFormat::Contiguous);
  });
}

// Whether operations are being recorded, on this thread.
int hvd_grad_enabled() { return at::GradMode::is_enabled(); }

// Has backward call `call(context, ...)` for the gradients of `inputs`, given those of `outputs`, which must be new
// tensors. `drop(context)` runs when the graph goes, or at once if this call fails or no input requires a gradient.
int hvd_differentiate(Tensor* const* inputs, size_t input_count, Tensor* const* outputs, size_t output_count,
                      BackwardCall call, HookDrop drop, void* context) {
  return guarded([&] {
    std::shared_ptr<torch::autograd::Node> node(new CallbackNode(call, drop, context), torch::autograd::deleteNode);
    if (!at::GradMode::is_enabled()) return;
    bool wanted = false;
    for (size_t i = 0; i < input_count; i++) {
      wanted |= inputs[i]->requires_grad();
      node->add_next_edge(torch::autograd::impl::gradient_edge(*inputs[i]));
    }
    if (!wanted) return;
    for (size_t i = 0; i < output_count; i++) torch::autograd::create_gradient_edge(*outputs[i], node);
  });
}

// Says why a callback fails.
void hvd_shim_set_error(const char* message) {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
}

// Backward from several roots, each with the gradient that comes from outside (null: 1, for a scalar root).
int hvd_backward(Tensor* const* roots, Tensor* const* grads, size_t count, int retain_graph) {
  return guarded([&] {
    std::vector<Tensor> outside;
    for (size_t i = 0; i < count; i++) outside.push_back(grads[i] ? *grads[i] : Tensor());
    torch::autograd::backward(gather(roots, count), outside, retain_graph != 0);
  });
}

// --- autocast: state of the calling thread ---

struct AutocastState {
  int enabled;
  int dtype;
  int cache;
};

int hvd_autocast_enter(int cuda, int dtype, AutocastState* before) {
  return guarded([&] {
    const auto device = device_type(cuda);
    *before = {at::autocast::is_autocast_enabled(device), int(at::autocast::get_autocast_dtype(device)),
               at::autocast::is_autocast_cache_enabled()};
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(dtype));
    at::autocast::set_autocast_enabled(device, true);
    at::autocast::set_autocast_cache_enabled(true);
    at::autocast::increment_nesting();
  });
}

// What operations are cast to, on this thread: a c10::ScalarType; -1 where they are not.
int hvd_autocast_dtype(int cuda) {
  const auto device = device_type(cuda);
  return at::autocast::is_autocast_enabled(device) ? int(at::autocast::get_autocast_dtype(device)) : -1;
}

int hvd_autocast_exit(int cuda, const AutocastState* before) {
  return guarded([&] {
    const auto device = device_type(cuda);
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device, before->enabled != 0);
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(before->dtype));
    at::autocast::set_autocast_cache_enabled(before->cache != 0);
  });
}

// --- fused updates over lists ---

int hvd_foreach_zero(Tensor* const* tensors, size_t count) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_zero_(gather(tensors, count));
  });
}

int hvd_foreach_mul(Tensor* const* tensors, size_t count, double factor) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    at::_foreach_mul_(gather(tensors, count), factor);
  });
}

// Writes the 2-norm of each tensor to `norms`, computed in torch's accumulation type.
int hvd_foreach_norm(Tensor* const* tensors, size_t count, double* norms) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const auto results = at::_foreach_norm(gather(tensors, count), 2);
    for (size_t i = 0; i < count; i++) norms[i] = results[i].item<double>();
  });
}

// The sum of the squares of all elements of a contiguous tensor, in f64, in an order that depends on its length alone:
// not on the number of threads, not on the processor.
int hvd_squared_norm(Tensor* flat, double* result) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    *result = squared_norm(*flat);
  });
}

// One AdamW update of `count` parameters (same dtype and device), with decoupled weight decay. `steps` are f32
// scalars: the number of updates before this one; they are advanced.
int hvd_fused_adamw(Tensor* const* params, Tensor* const* grads, Tensor* const* exp_avgs, Tensor* const* exp_avg_sqs,
                    Tensor* const* steps, size_t count, double lr, double beta1, double beta2, double weight_decay,
                    double eps) {
  return guarded([&] {
    at::NoGradGuard no_grad;
    const auto step = gather(steps, count);
    at::_foreach_add_(step, 1);
    at::_fused_adamw_(gather(params, count), gather(grads, count), gather(exp_avgs, count),
                      gather(exp_avg_sqs, count), {}, step, lr, beta1, beta2, weight_decay, eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  });
}

// --- computing on several threads ---

// Calls `call(context, begin, end)` for parts of 0..count that cover it, of at least `grain` each (but the last), on torch's threads.
int hvd_parallel_for(int64_t count, int64_t grain, void (*call)(void* context, int64_t begin, int64_t end), void* context) {
  return guarded([&] { at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { call(context, begin, end); }); });
}

// --- the process ---

// Refuses (or, with `warn_only`, warns of) operations that have no deterministic implementation.
int hvd_set_deterministic(int on, int warn_only) {
  return guarded([&] {
    at::globalContext().setDeterministicAlgorithms(on != 0, warn_only != 0);
    at::globalContext().setDeterministicCuDNN(on != 0);
    at::globalContext().setBenchmarkCuDNN(on == 0 && at::globalContext().benchmarkCuDNN());
  });
}

// A tensor of `count` bytes over memory of somebody else. Calls `drop(context)` once, when the last reference to its
// storage is gone, or at once where it fails.
int hvd_over_memory(void* data, int64_t count, HookDrop drop, void* context, Tensor** result) {
  std::shared_ptr<void> owner(context, drop);
  return guarded([&] {
    *result = new Tensor(at::from_blob(data, {count}, [owner](void*) {}, at::TensorOptions().dtype(at::kByte)));
  });
}

// Loads a library for the whole process. Null, or why not.
const char* hvd_dlopen(const char* name) {
  if (dlopen(name, RTLD_NOW | RTLD_GLOBAL)) return nullptr;
  const char* reason = dlerror();
  return reason ? reason : "dlopen failed";
}

}  // extern "C"
