// A second torch device without a GPU: PrivateUse1, its memory is the host's, its books are a card's.
//
// Tensors really live on device `fakegpu`: mixing devices fails as on CUDA, memory is allocated through a caching
// allocator with a capacity and a context that is paid on first use, copies are counted by direction, and errors come
// when told: out of memory at the n-th allocation, or a device that fails for good.  Every kernel runs on the CPU; what
// moves inside a kernel is not a copy of the caller's and is not counted.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

namespace {

constexpr auto kType = DeviceType::PrivateUse1;
thread_local bool in_kernel = false;

struct InKernel {
  bool before = in_kernel;
  InKernel() { in_kernel = true; }
  ~InKernel() { in_kernel = before; }
};

struct Books {
  std::mutex lock;
  uint64_t own_total = 8ull << 30, own_used = 0, own_reserved = 0, own_peak = 0;
  // The card's own figures, or those of a card of the fake NVML, which other processes draw on too.
  uint64_t *total = &own_total, *used = &own_used, *driver = &own_reserved, *card_peak = &own_peak;
  uint64_t context = 0, context_paid = 0;
  uint64_t allocated = 0, reserved = 0, peak = 0;
  int64_t allocations = 0, all_allocations = 0, fail_at = -1;
  int64_t h2d = 0, d2h = 0, d2d = 0;
  uint64_t h2d_bytes = 0, d2h_bytes = 0;
  bool has_context = false, broken = false;
  std::unordered_map<void*, size_t> live;
  std::map<size_t, std::vector<void*>> cache;

  bool take(uint64_t bytes) {
    uint64_t before = __atomic_load_n(used, __ATOMIC_SEQ_CST);
    do {
      if (before + *driver + bytes > *total) return false;
    } while (!__atomic_compare_exchange_n(used, &before, before + bytes, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    uint64_t now = before + bytes, seen = __atomic_load_n(card_peak, __ATOMIC_SEQ_CST);
    while (seen < now &&
           !__atomic_compare_exchange_n(card_peak, &seen, now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return true;
  }
  void give(uint64_t bytes) { __atomic_sub_fetch(used, bytes, __ATOMIC_SEQ_CST); }

  void drop_cache() {
    for (auto& [size, blocks] : cache)
      for (void* block : blocks) {
        std::free(block);
        reserved -= size;
        give(size);
      }
    cache.clear();
  }
};

Books& books() {
  static auto* forever = new Books;  // tensors may outlive every static
  return *forever;
}

void check_alive() {
  TORCH_CHECK(!books().broken, "FAKEGPU error: device-side assert triggered");
}

void release(void* block) {
  if (!block) return;
  auto& b = books();
  std::lock_guard<std::mutex> guard(b.lock);
  size_t size = b.live.at(block);
  b.live.erase(block);
  b.allocated -= size;
  b.cache[size].push_back(block);
}

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override {
    auto& b = books();
    std::lock_guard<std::mutex> guard(b.lock);
    check_alive();
    Device device(kType, 0);
    if (n == 0) return {nullptr, nullptr, &release, device};
    b.all_allocations++;
    if (!in_kernel) b.allocations++;
    TORCH_CHECK_WITH(
        OutOfMemoryError, b.fail_at < 0 || b.fail_at-- != 0, "FAKEGPU out of memory. Tried to allocate ", n, " bytes");
    if (!b.has_context) {
      // The driver makes the context, not the allocator: torch tells this as any other error of the runtime.
      if (!b.take(b.context)) throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, 2, "FAKEGPU error: out of memory");
      b.has_context = true;
      b.context_paid = b.context;
    }
    size_t size = (n + 511) / 512 * 512;
    void* block = nullptr;
    auto kept = b.cache.find(size);
    if (kept != b.cache.end() && !kept->second.empty()) {
      block = kept->second.back();
      kept->second.pop_back();
    } else {
      if (!b.take(size)) {
        b.drop_cache();
        TORCH_CHECK_WITH(OutOfMemoryError, b.take(size), "FAKEGPU out of memory. Tried to allocate ", n, " bytes");
      }
      if (posix_memalign(&block, 512, size) != 0) {
        b.give(size);
        TORCH_CHECK(false, "the host has no memory left");
      }
      b.reserved += size;
    }
    b.live[block] = size;
    b.allocated += size;
    b.peak = std::max(b.peak, b.allocated);
    return {block, block, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    std::lock_guard<std::mutex> guard(books().lock);
    check_alive();
    books().drop_cache();
  }
  void recordStream(const c10::DataPtr&, Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override {
    std::lock_guard<std::mutex> guard(books().lock);
    c10::CachingDeviceAllocator::DeviceStats stats;
    stats.allocated_bytes[0].current = static_cast<int64_t>(books().allocated);
    stats.reserved_bytes[0].current = static_cast<int64_t>(books().reserved);
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex) override {}
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex) override {
    auto& b = books();
    return {*b.total - *b.driver - *b.used, *b.total};
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kType, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream stream() { return Stream(Stream::DEFAULT, Device(kType, 0)); }
  DeviceType type() const override { return kType; }
  Device exchangeDevice(Device) const override { return Device(kType, 0); }
  Device getDevice() const override { return Device(kType, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream exchangeStream(Stream) const override { return stream(); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { check_alive(); }
  void synchronizeDevice(const DeviceIndex) const override { check_alive(); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return books().has_context; }
  DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  Device getDeviceFromPtr(void*) const override { return Device(kType, 0); }
};

bool on_device(const Tensor& t) { return t.defined() && t.device().type() == kType; }

// The same memory seen as a CPU tensor.
Tensor host_view(const Tensor& t) {
  if (!on_device(t)) return t;
  auto options = at::TensorOptions().dtype(t.dtype()).device(DeviceType::CPU);
  return at::from_blob(t.mutable_data_ptr(), t.sizes(), t.strides(), options);
}

Tensor to_device(const Tensor& t) {
  InKernel quiet;
  return t.defined() ? t.to(Device(kType, 0)) : t;
}

Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  {
    auto& b = books();
    std::lock_guard<std::mutex> guard(b.lock);
    check_alive();
    if (!in_kernel) {
      if (!on_device(from)) b.h2d++, b.h2d_bytes += to.nbytes();
      else if (!on_device(to)) b.d2h++, b.d2h_bytes += from.nbytes();
      else b.d2d++;
    }
  }
  at::NoGradGuard no_grad;
  host_view(to).copy_(host_view(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}

Tensor as_strided(const Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}

Tensor reshape_alias(const Tensor& t, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::_reshape_alias(t, size, stride);
}

Tensor view(const Tensor& t, c10::IntArrayRef size) { return at::native::view(t, size); }

bool may_swap_data(const Tensor&, const Tensor&) { return true; }

void same_device(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(
      !b.defined() || on_device(a) == on_device(b),
      "Expected all tensors to be on the same device, but found at least two devices, fakegpu:0 and cpu!");
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups) {
  check_alive();
  same_device(input, weight);
  std::optional<Tensor> host_bias;
  if (bias && bias->defined()) {
    same_device(input, *bias);
    host_bias = host_view(*bias);
  }
  return to_device(at::convolution(
      host_view(input), host_view(weight), host_bias, stride, padding, dilation, transposed, output_padding, groups));
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check_alive();
  // CUDA takes indices from the host, and so does this; cpu_fallback alone would take anything from anywhere.
  if (op.schema().name() != "aten::index" && op.schema().name() != "aten::index_put_") {
    bool device = false, host = false;
    auto note = [&](const Tensor& t) {
      if (!t.defined()) return;
      device |= on_device(t);
      host |= !on_device(t) && t.dim() > 0;
    };
    for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
      if (value.isTensor()) note(value.toTensor());
      else if (value.isTensorList())
        for (const auto& t : value.toTensorList()) note(t);
    }
    TORCH_CHECK(
        !(device && host), "Expected all tensors to be on the same device, but found at least two devices, ",
        "fakegpu:0 and cpu! (when running ", op.schema().name(), ")");
  }
  InKernel quiet;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("view", &view);
  m.impl("_has_compatible_shallow_copy_type", &may_swap_data);
  m.impl("convolution_overrideable", &convolution);
}

}  // namespace

namespace at::native {
static int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
    bool) {
  return 0;  // SDPBackend::math
}
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &plain_attention);
}  // namespace at::native

extern "C" {

void fakegpu_init() {
  static auto* hooks = new Hooks;
  if (!at::isPrivateUse1HooksRegistered()) at::RegisterPrivateUse1HooksInterface(hooks);
}

// Capacity and context of the card; errors and counters are forgotten, tensors and the paid context are not.
void fakegpu_reset(uint64_t total, uint64_t context) {
  auto& b = books();
  std::lock_guard<std::mutex> guard(b.lock);
  b.broken = false;
  b.fail_at = -1;
  b.drop_cache();
  if (b.has_context) b.give(b.context_paid);
  b.has_context = false;
  b.context = context;
  *b.total = total;
  b.allocations = b.all_allocations = b.h2d = b.d2h = b.d2d = 0;
  b.h2d_bytes = b.d2h_bytes = 0;
  b.peak = b.allocated;
}

// Keep the books in somebody else's memory, as the fake NVML's shared file; null for our own.
void fakegpu_link(uint64_t* total, uint64_t* used, uint64_t* driver, uint64_t* peak) {
  auto& b = books();
  std::lock_guard<std::mutex> guard(b.lock);
  uint64_t mine = b.reserved + (b.has_context ? b.context_paid : 0);
  b.give(mine);
  b.total = total ? total : &b.own_total;
  b.used = used ? used : &b.own_used;
  b.driver = driver ? driver : &b.own_reserved;
  b.card_peak = peak ? peak : &b.own_peak;
  __atomic_add_fetch(b.used, mine, __ATOMIC_SEQ_CST);
}

void fakegpu_fail_allocation(int64_t n) {
  std::lock_guard<std::mutex> guard(books().lock);
  books().fail_at = n;
}

void fakegpu_break(int broken) {
  std::lock_guard<std::mutex> guard(books().lock);
  books().broken = broken != 0;
}

void fakegpu_figures(int64_t* to) {
  auto& b = books();
  std::lock_guard<std::mutex> guard(b.lock);
  int64_t figures[] = {
      static_cast<int64_t>(*b.used), static_cast<int64_t>(b.allocated), static_cast<int64_t>(b.reserved),
      static_cast<int64_t>(b.peak), b.allocations, b.all_allocations, b.h2d, static_cast<int64_t>(b.h2d_bytes), b.d2h,
      static_cast<int64_t>(b.d2h_bytes), b.d2d};
  std::memcpy(to, figures, sizeof figures);
}
}
