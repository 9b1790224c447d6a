// What a build of torch without CUDA lacks for fake tensors on "cuda": a guard that knows of one
// device and does nothing.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::Stream;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device only() { return Device(c10::DeviceType::CUDA, 0); }
  static Stream line() { return Stream(Stream::DEFAULT, only()); }

  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return only(); }
  Device getDevice() const override { return only(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return line(); }
  Stream getNewStream(Device, int) const override { return line(); }
  Stream exchangeStream(Stream) const noexcept override { return line(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace
