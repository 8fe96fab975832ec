// The C interface.
#include <algorithm>
#include <cstring>

#include "launch.h"
#include "tensor_map.h"

struct EmuModule {
  emu::CompiledModule module;
  explicit EmuModule(const char* text) : module(text) {}
};

namespace emu {

namespace {
thread_local std::string last_error;
}

void set_error(const std::string& text) { last_error = text; }

CompiledModule::CompiledModule(const char* text) : module(parse(text)) {
  for (const auto& [name, v] : module.variables) {
    if (v.space == Space::Shared) continue;
    if (v.external) throw Fault("the module does not define " + name);
    storage.push_back(std::make_unique<uint8_t[]>(v.size + 256));
    uint64_t at = (reinterpret_cast<uint64_t>(storage.back().get()) + 255) / 256 * 256;
    std::memset(reinterpret_cast<void*>(at), 0, v.size);
    std::memcpy(reinterpret_cast<void*>(at), v.init.data(), v.init.size());
    addresses[name] = at;
    variables.emplace_back(at, at + v.size);
  }
  for (const auto& [name, v] : module.variables)
    for (const auto& [offset, symbol] : v.pointers) {
      if (v.space == Space::Shared) continue;
      auto found = addresses.find(symbol);
      if (found == addresses.end()) throw Fault("the address of " + symbol + " is not known");
      uint64_t* slot = reinterpret_cast<uint64_t*>(addresses[name] + offset);
      *slot += found->second;
    }
  for (const std::string& name : module.order) {
    const Function& f = module.functions.at(name);
    if (f.entry && f.defined) programs.push_back(decode(module, f));
  }
}

const Program* CompiledModule::find(const std::string& kernel) const {
  for (const auto& p : programs)
    if (p->name == kernel) return p.get();
  return nullptr;
}

void launch(const CompiledModule& module, const Program& program, const LaunchShape& shape,
            const void* const* params, const EmuConfig& config,
            const std::vector<EmuBuffer>& buffers, EmuStats& stats) {
  uint64_t threads = uint64_t(shape.block[0]) * shape.block[1] * shape.block[2];
  const Function& f = program.function;
  if (threads == 0 || threads > 1024 || shape.block[2] > 64)
    throw Fault(format("%s: a block of %llu threads, expected 1 to 1024", program.name.c_str(),
                       (unsigned long long)threads));
  if (f.max_threads && threads > f.max_threads)
    throw Fault(format("%s: a block of %llu threads, it is bounded to %u", program.name.c_str(),
                       (unsigned long long)threads, f.max_threads));
  if (!shape.grid[0] || !shape.grid[1] || !shape.grid[2] || shape.grid[0] > 0x7fffffff ||
      shape.grid[1] > 65535 || shape.grid[2] > 65535)
    throw Fault(format("%s: a grid of %u x %u x %u blocks", program.name.c_str(), shape.grid[0],
                       shape.grid[1], shape.grid[2]));
  uint64_t shared = uint64_t(program.own_shared) + shape.dynamic_shared;
  if (shared > 227 * 1024)
    throw Fault(format("%s: %llu bytes of shared memory, a block has at most %d",
                       program.name.c_str(), (unsigned long long)shared, 227 * 1024));
  Launch l(program, config);
  l.grid = shape.grid;
  l.block = shape.block;
  l.dynamic_shared = shape.dynamic_shared;
  l.params.resize(f.param_bytes + 64);
  uint64_t start = reinterpret_cast<uint64_t>(l.params.data());
  l.param_base = l.params.data() + (64 - start % 64) % 64;
  for (size_t i = 0; i < f.params.size(); i++)
    std::memcpy(l.param_base + f.params[i].offset, params[i], f.params[i].size);
  l.any_buffer = buffers.empty();
  for (const EmuBuffer& b : buffers) l.buffers.emplace_back(b.address, b.address + b.bytes);
  if (!buffers.empty()) {
    for (const auto& v : module.variables) l.buffers.push_back(v);
    uint64_t base = reinterpret_cast<uint64_t>(l.param_base);
    l.buffers.emplace_back(base, base + f.param_bytes);
  }
  std::sort(l.buffers.begin(), l.buffers.end());
  l.stats = &stats;
  stats.threads = threads;
  stats.shared_bytes = shared;
  l.random.seed(config.seed);
  for (const auto& [name, address] : module.addresses) l.variable_address[name] = address;
  l.run();
}

}  // namespace emu

namespace {

// Runs f; on a fault keeps its message and returns `failed`.
template <class T, class F>
T guarded(T failed, F&& f) {
  try {
    return f();
  } catch (const std::exception& e) {
    emu::set_error(e.what());
    return failed;
  }
}

const emu::Program& program_of(EmuModule* m, const char* kernel) {
  const emu::Program* p = m->module.find(kernel);
  if (!p) throw emu::Fault(std::string("there is no kernel ") + kernel);
  return *p;
}

}  // namespace

extern "C" {

EmuModule* emu_load(const char* ptx_text) {
  return guarded<EmuModule*>(nullptr, [&] { return new EmuModule(ptx_text); });
}

void emu_unload(EmuModule* m) { delete m; }

int emu_kernels(EmuModule* m) { return int(m->module.programs.size()); }

const char* emu_kernel_name(EmuModule* m, int index) {
  return m->module.programs.at(size_t(index))->name.c_str();
}

int emu_params(EmuModule* m, const char* kernel) {
  return guarded(-1, [&] { return int(program_of(m, kernel).function.params.size()); });
}

int emu_param_size(EmuModule* m, const char* kernel, int index) {
  return guarded(-1,
                 [&] { return int(program_of(m, kernel).function.params.at(size_t(index)).size); });
}

int emu_launch(EmuModule* m, const char* kernel, const uint32_t grid[3], const uint32_t block[3],
               uint32_t dynamic_shared, const void* const* params, const EmuConfig* config,
               const EmuBuffer* buffers, int count, EmuStats* stats) {
  EmuStats own{};
  if (!stats) stats = &own;
  *stats = EmuStats{};
  return guarded(1, [&] {
    emu::LaunchShape shape{
        {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared};
    emu::launch(m->module, program_of(m, kernel), shape, params, *config,
                std::vector<EmuBuffer>(buffers, buffers + count), *stats);
    return 0;
  });
}

const char* emu_error(void) { return emu::last_error.c_str(); }

const char* emu_stats_names(void) {
  return "instructions blocks barriers mbarrier_phases mma wgmma ldmatrix ldmatrix_wavefronts "
         "stmatrix stmatrix_wavefronts shared_loads shared_load_wavefronts shared_load_ideal "
         "shared_stores shared_store_wavefronts shared_store_ideal global_loads "
         "global_load_sectors global_stores global_store_sectors local_accesses atomics shuffles "
         "ex2 cp_async_bytes bulk_bytes threads shared_bytes";
}

int emu_tensor_map(void* map128, int dtype, const void* base, int rank, const uint64_t* dims,
                   const uint64_t* strides_bytes, const uint32_t* box,
                   const uint32_t* element_strides, int interleave, int swizzle, int /*l2*/,
                   int oob) {
  return guarded(1, [&] {
    emu::TensorMap map = emu::encode_tensor_map(dtype, base, rank, dims, strides_bytes, box,
                                                element_strides, interleave, swizzle, oob);
    std::memcpy(map128, &map, sizeof map);
    return 0;
  });
}

}  // extern "C"
