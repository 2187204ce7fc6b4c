// A libcuda.so whose devices are simulated: the functions of NVIDIA's driver that Graft calls, over the kernels that are
// compiled for this machine. It stands in for the driver where the loader finds it first (LD_LIBRARY_PATH), so that the
// way through the driver is tested without a GPU, with what can be wrong there:
//
//   GRAFT_DRIVER_DEVICES      how many devices there are (1)
//   GRAFT_DRIVER_CAPABILITY   their compute capability, as 80 for 8.0 (that of the kernels)
//   GRAFT_DRIVER_VERSION      the driver's version, as 12090 for 12.9 (13000)
//   GRAFT_DRIVER_PTX          the latest PTX that it knows, as 88 for 8.8 (90)
//   GRAFT_DRIVER_MEMORY       bytes of a device (4 GiB)
//   GRAFT_DRIVER_GRAPHS       0: there is no memory for graphs (1)
//   GRAFT_DRIVER_COUNTS       1: says on stderr, at the end, how often work was sent and waited for
//   GRAFT_CUDA_ORDER          the order in which threads run, as in scheduler.cpp
//
// A stream is what it is on a device: calls are put into a queue and done when somebody waits for them. Who changes pinned
// memory too early changes what arrives, and who reads it too early finds what was there before.
#include "device.hpp"
#include "fixed.hpp"

#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

extern "C" int graft_simulation_launch(const char *, const unsigned *, const unsigned *, unsigned, void **,
                                       unsigned, char *, size_t);
extern "C" int graft_simulation_parameters(const char *name, size_t *sizes, int most);

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    UNSUPPORTED_PTX_VERSION = 222,
    NOT_FOUND = 500,
    LAUNCH_FAILED = 719,
};

long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

struct Event {
    unsigned long number = 0; // of the last call before it
};
typedef std::function<int()> Work;

// Everything there is, behind one lock. Devices share it: there is one stream at a time that has work.
std::recursive_mutex lock;
bool started;
std::deque<Work> queue;
unsigned long asked, done;
int failed; // what a call in the queue failed with, until somebody waits
std::map<uint64_t, size_t> allocated;
size_t taken;
std::map<char *, size_t> pinned;
std::set<std::string> names;
std::map<std::string, size_t> fixed;   // shared memory of kernels whatever a launch asks for
std::map<std::string, size_t> allowed; // dynamic shared memory of kernels for which more was asked for
thread_local void *current;
char context, stream;

// How often something was asked for.
struct Counts {
    long alone, graphs, waits; // calls that are one task, and such that are many
    ~Counts() {
        if (setting("GRAFT_DRIVER_COUNTS", 0))
            fprintf(stderr, "simulated driver: %ld tasks alone, %ld graphs, %ld waits\n", alone, graphs, waits);
    }
} counts;

typedef std::lock_guard<std::recursive_mutex> Guard;

void put(Work work) {
    queue.push_back(std::move(work));
    asked++;
}

void run_until(unsigned long number) {
    while (done < number && !queue.empty()) {
        Work work = std::move(queue.front());
        queue.pop_front();
        done++;
        int result = work();
        if (result && !failed) failed = result;
    }
}

void put_alone(Work work) {
    counts.alone++;
    put(std::move(work));
}

int wait_for(unsigned long number) {
    run_until(number);
    int result = failed;
    failed = 0;
    return result;
}

int entered() { return started ? (current ? SUCCESS : INVALID_CONTEXT) : NOT_INITIALIZED; }

bool is_pinned(const void *from, size_t bytes) {
    auto after = pinned.upper_bound((char *)from);
    if (after == pinned.begin()) return false;
    --after;
    return (char *)from + bytes <= after->first + after->second;
}

size_t memory() { return (size_t)setting("GRAFT_DRIVER_MEMORY", 4l << 30); }

// Bytes of the device that a range lies in; a call with another is a fault.
bool is_device(uint64_t address, size_t bytes) {
    auto after = allocated.upper_bound(address);
    if (after == allocated.begin()) return false;
    --after;
    return address + bytes <= after->first + after->second;
}

int outside(const char *call, uint64_t address, size_t bytes) {
    fprintf(stderr, "simulated driver: %s of %zu bytes at %llx, which nobody allocated\n", call, bytes,
            (unsigned long long)address);
    return INVALID_VALUE;
}

int set_elements(uint64_t to, size_t count, const void *element, size_t size) {
    Guard guard(lock);
    if (int result = entered()) return result;
    if (!is_device(to, count * size)) return outside("a memset", to, count * size);
    uint32_t value = 0;
    memcpy(&value, element, size);
    put_alone([=] {
        for (size_t i = 0; i < count; i++) memcpy((char *)to + i * size, &value, size);
        return 0;
    });
    return SUCCESS;
}

} // namespace

#define CU extern "C" int

CU cuInit(unsigned) {
    Guard guard(lock);
    if (setting("GRAFT_DRIVER_DEVICES", 1) == 0) return NO_DEVICE;
    started = true;
    return SUCCESS;
}

CU cuGetErrorString(int result, const char **text) {
    static const std::map<int, const char *> texts = {
        {INVALID_VALUE, "invalid argument"},
        {OUT_OF_MEMORY, "out of memory"},
        {NOT_INITIALIZED, "initialization error"},
        {NO_DEVICE, "no CUDA-capable device is detected"},
        {INVALID_DEVICE, "invalid device ordinal"},
        {INVALID_CONTEXT, "invalid device context"},
        {UNSUPPORTED_PTX_VERSION, "the provided PTX was compiled with an unsupported toolchain."},
        {NOT_FOUND, "named symbol not found"},
        {LAUNCH_FAILED, "unspecified launch failure"},
    };
    auto found = texts.find(result);
    if (found == texts.end()) return INVALID_VALUE;
    *text = found->second;
    return SUCCESS;
}

CU cuDriverGetVersion(int *version) {
    *version = (int)setting("GRAFT_DRIVER_VERSION", 13000);
    return SUCCESS;
}

CU cuDeviceGetCount(int *count) {
    *count = (int)setting("GRAFT_DRIVER_DEVICES", 1);
    return started ? SUCCESS : NOT_INITIALIZED;
}

CU cuDeviceGet(int *device, int ordinal) {
    if (!started) return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= setting("GRAFT_DRIVER_DEVICES", 1)) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

CU cuDeviceGetName(char *name, int length, int device) {
    snprintf(name, length, "simulated device %d", device);
    return SUCCESS;
}

CU cuDeviceTotalMem_v2(size_t *bytes, int) {
    *bytes = memory();
    return SUCCESS;
}

CU cuDeviceGetAttribute(int *value, int attribute, int) {
    int capability = (int)setting("GRAFT_DRIVER_CAPABILITY", __CUDA_ARCH__ / 10);
    switch (attribute) {
    case 16: *value = 4; break;          // multiprocessors
    case 38: *value = 4 << 20; break;    // bytes of the second-level cache
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 97: *value = (capability == 90 ? 227 : 163) << 10; break; // shared memory that a block may ask for
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}

CU cuDevicePrimaryCtxRetain(void **to, int) {
    *to = &context;
    return SUCCESS;
}
CU cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
CU cuCtxSetCurrent(void *to) {
    current = to;
    return SUCCESS;
}

CU cuStreamCreate(void **to, unsigned) {
    *to = &stream;
    return entered();
}
CU cuStreamDestroy_v2(void *) { return SUCCESS; }
CU cuStreamSynchronize(void *) {
    Guard guard(lock);
    counts.waits++;
    if (int result = entered()) return result;
    return wait_for(asked);
}

CU cuEventCreate(void **to, unsigned) {
    *to = new Event;
    return entered();
}
CU cuEventDestroy_v2(void *event) {
    delete (Event *)event;
    return SUCCESS;
}
CU cuEventRecord(void *event, void *) {
    Guard guard(lock);
    ((Event *)event)->number = asked;
    return entered();
}
CU cuEventSynchronize(void *event) {
    Guard guard(lock);
    counts.waits++;
    if (int result = entered()) return result;
    return wait_for(((Event *)event)->number);
}

CU cuMemGetInfo_v2(size_t *free, size_t *total) {
    Guard guard(lock);
    *total = memory();
    *free = *total - taken;
    return entered();
}

CU cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    Guard guard(lock);
    if (int result = entered()) return result;
    if (bytes == 0) return INVALID_VALUE;
    if (bytes > memory() - taken) return OUT_OF_MEMORY;
    void *found = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!found) return OUT_OF_MEMORY;
    taken += bytes;
    *address = (uint64_t)found;
    allocated[*address] = bytes;
    return SUCCESS;
}

CU cuMemFree_v2(uint64_t address) {
    Guard guard(lock);
    if (int result = entered()) return result;
    auto found = allocated.find(address);
    if (found == allocated.end()) return INVALID_VALUE;
    run_until(asked);
    taken -= found->second;
    allocated.erase(found);
    free((void *)address);
    return SUCCESS;
}

CU cuMemAllocHost_v2(void **to, size_t bytes) {
    Guard guard(lock);
    if (int result = entered()) return result;
    *to = malloc(bytes);
    if (!*to) return OUT_OF_MEMORY;
    pinned[(char *)*to] = bytes;
    return SUCCESS;
}

CU cuMemFreeHost(void *from) {
    Guard guard(lock);
    if (!pinned.erase((char *)from)) return INVALID_VALUE;
    run_until(asked);
    free(from);
    return SUCCESS;
}

CU cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *) {
    Guard guard(lock);
    if (int result = entered()) return result;
    if (!is_device(to, bytes)) return outside("an upload", to, bytes);
    if (is_pinned(from, bytes)) {
        put_alone([=] {
            memcpy((void *)to, from, bytes);
            return 0;
        });
        return SUCCESS;
    }
    // Of ordinary memory a little is put aside; for more, the caller waits until the device gets there.
    if (bytes > 64 << 10) run_until(asked);
    std::string aside((const char *)from, bytes);
    put_alone([=] {
        memcpy((void *)to, aside.data(), aside.size());
        return 0;
    });
    return SUCCESS;
}

CU cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *) {
    Guard guard(lock);
    if (int result = entered()) return result;
    if (!is_device(from, bytes)) return outside("a download", from, bytes);
    if (is_pinned(to, bytes)) {
        put_alone([=] {
            memcpy(to, (void *)from, bytes);
            return 0;
        });
        return SUCCESS;
    }
    counts.alone++;
    counts.waits++;
    run_until(asked);
    memcpy(to, (void *)from, bytes);
    return SUCCESS;
}

CU cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *) {
    Guard guard(lock);
    if (int result = entered()) return result;
    if (!is_device(to, bytes)) return outside("a copy", to, bytes);
    if (!is_device(from, bytes)) return outside("a copy", from, bytes);
    put_alone([=] {
        memmove((void *)to, (void *)from, bytes);
        return 0;
    });
    return SUCCESS;
}

// As cuda.h has it.
struct Copy2D {
    size_t from_x, from_y;
    int from_type;
    const void *from_host;
    uint64_t from_device;
    void *from_array;
    size_t from_pitch;
    size_t to_x, to_y;
    int to_type;
    void *to_host;
    uint64_t to_device;
    void *to_array;
    size_t to_pitch;
    size_t width, height;
};
CU cuMemcpy2DAsync_v2(const Copy2D *given, void *) {
    Guard guard(lock);
    if (int result = entered()) return result;
    Copy2D copy = *given;
    constexpr int DEVICE = 2;
    if (copy.from_type != DEVICE || copy.to_type != DEVICE || copy.height == 0) return INVALID_VALUE;
    size_t from_bytes = (copy.height - 1) * copy.from_pitch + copy.width;
    size_t to_bytes = (copy.height - 1) * copy.to_pitch + copy.width;
    if (!is_device(copy.from_device, from_bytes)) return outside("rows", copy.from_device, from_bytes);
    if (!is_device(copy.to_device, to_bytes)) return outside("rows", copy.to_device, to_bytes);
    put_alone([=] {
        for (size_t row = 0; row < copy.height; row++)
            memmove((char *)copy.to_device + row * copy.to_pitch, (char *)copy.from_device + row * copy.from_pitch,
                    copy.width);
        return 0;
    });
    return SUCCESS;
}

CU cuMemsetD8Async(uint64_t to, uint8_t value, size_t count, void *) { return set_elements(to, count, &value, 1); }
CU cuMemsetD16Async(uint64_t to, uint16_t value, size_t count, void *) { return set_elements(to, count, &value, 2); }
CU cuMemsetD32Async(uint64_t to, uint32_t value, size_t count, void *) { return set_elements(to, count, &value, 4); }

CU cuModuleLoadData(void **module, const void *image) {
    Guard guard(lock);
    if (int result = entered()) return result;
    const char *version = strstr((const char *)image, "\n.version ");
    int major = 0, minor = 0;
    if (!version || sscanf(version, "\n.version %d.%d", &major, &minor) != 2) return INVALID_VALUE;
    if (10 * major + minor > setting("GRAFT_DRIVER_PTX", 90)) return UNSUPPORTED_PTX_VERSION;
    for (const auto &[name, bytes] : simulation::fixed_shared((const char *)image)) fixed[name] = bytes;
    *module = &context;
    return SUCCESS;
}
CU cuModuleUnload(void *) { return SUCCESS; }
CU cuModuleGetFunction(void **function, void *, const char *name) {
    Guard guard(lock);
    if (graft_simulation_parameters(name, nullptr, 0) < 0) return NOT_FOUND;
    *function = (void *)names.insert(name).first->c_str();
    return SUCCESS;
}

// Of shared memory a block has 48 KB together, unless its kernel was allowed to have more of its dynamic part.
enum Attribute { FIXED = 1, DYNAMIC = 8 };
CU cuFuncGetAttribute(int *value, int attribute, void *function) {
    Guard guard(lock);
    if (attribute != FIXED) return INVALID_VALUE;
    *value = (int)fixed[(const char *)function];
    return SUCCESS;
}
CU cuFuncSetAttribute(void *function, int attribute, int value) {
    Guard guard(lock);
    int most;
    cuDeviceGetAttribute(&most, 97, 0);
    const char *name = (const char *)function;
    if (attribute != DYNAMIC || value < 0 || fixed[name] + value > (size_t)most) return INVALID_VALUE;
    allowed[name] = value;
    return SUCCESS;
}
static bool has_shared(const char *name, size_t dynamic) {
    auto more = allowed.find(name);
    return more != allowed.end() ? dynamic <= more->second : fixed[name] + dynamic <= 48 << 10;
}

// As cuda.h has it.
struct KernelNode {
    void *function;
    unsigned grid[3], block[3], shared;
    void **parameters, **extra;
    void *kernel, *context;
};
// A launch, with copies of its parameters; nothing if it cannot be.
static Work launch(const KernelNode &node) {
    const char *name = (const char *)node.function;
    size_t sizes[32];
    int count = graft_simulation_parameters(name, sizes, 32);
    if (count < 0 || count > 32 || !has_shared(name, node.shared)) return nullptr;
    std::vector<std::string> bytes;
    for (int i = 0; i < count; i++) bytes.emplace_back((const char *)node.parameters[i], sizes[i]);
    return [=] {
        std::vector<std::vector<uint64_t>> places;
        std::vector<void *> given;
        for (const std::string &one : bytes) {
            places.emplace_back(one.size() / 8 + 1);
            memcpy(places.back().data(), one.data(), one.size());
            given.push_back(places.back().data());
        }
        char text[2048];
        unsigned order = (unsigned)setting("GRAFT_CUDA_ORDER", 0);
        if (!graft_simulation_launch(name, node.grid, node.block, node.shared, given.data(), order, text, sizeof text))
            return 0;
        fprintf(stderr, "simulated driver: %s\n", text);
        return (int)LAUNCH_FAILED;
    };
}

CU cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                  unsigned shared, void *, void **parameters, void **) {
    Guard guard(lock);
    if (int result = entered()) return result;
    KernelNode node = {function, {gx, gy, gz}, {bx, by, bz}, shared, parameters, nullptr, nullptr, nullptr};
    Work work = launch(node);
    if (!work) return INVALID_VALUE;
    put_alone(std::move(work));
    return SUCCESS;
}

#if __CUDA_ARCH__ >= 900
extern "C" int graft_simulation_tensor_map(uint64_t *to, uint64_t address, uint64_t element, const uint64_t *dims,
                                           const uint64_t *strides, const uint64_t *box);
CU cuTensorMapEncodeTiled(uint64_t *to, int type, unsigned rank, void *address, const uint64_t *dims,
                          const uint64_t *strides, const uint32_t *box, const uint32_t *every, int interleave,
                          int swizzle, int, int) {
    constexpr int FLOAT32 = 7, BFLOAT16 = 9, SWIZZLE_128B = 3;
    bool plain = rank == 3 && interleave == 0 && swizzle == SWIZZLE_128B && every[0] == 1 && every[1] == 1 && every[2] == 1;
    if (!plain || (type != FLOAT32 && type != BFLOAT16)) return INVALID_VALUE;
    uint64_t boxes[3] = {box[0], box[1], box[2]};
    uint64_t element = type == FLOAT32 ? 4 : 2;
    if (!is_device((uint64_t)address, 1)) return outside("a tensor map", (uint64_t)address, 1);
    return graft_simulation_tensor_map(to, (uint64_t)address, element, dims, strides, boxes) ? INVALID_VALUE : SUCCESS;
}
#endif

// --- Graphs: a chain of nodes, each behind the one before it. What is ready to be launched has copies of the nodes.

struct Node {
    Work work;
    enum Kind { KERNEL, COPY, SET } kind;
};
struct Graph {
    std::vector<Node *> nodes;
};
struct Ready {
    std::vector<std::pair<Node *, Work>> works;
};

static int add(Node **to, Graph *graph, Node *const *behind, size_t count, Work work, Node::Kind kind) {
    if (!work || count > 1 || (count == 1) == graph->nodes.empty()) return INVALID_VALUE;
    if (count == 1 && *behind != graph->nodes.back()) return INVALID_VALUE;
    *to = new Node{std::move(work), kind};
    graph->nodes.push_back(*to);
    return SUCCESS;
}

CU cuGraphCreate(Graph **to, unsigned) {
    *to = new Graph;
    return entered();
}
CU cuGraphDestroy(Graph *graph) {
    for (Node *node : graph->nodes) delete node;
    delete graph;
    return SUCCESS;
}
CU cuGraphAddKernelNode_v2(Node **to, Graph *graph, Node *const *behind, size_t count, const KernelNode *node) {
    Guard guard(lock);
    if (int result = entered()) return result;
    return add(to, graph, behind, count, launch(*node), Node::KERNEL);
}

// As cuda.h has it.
struct Copy3D {
    size_t from_x, from_y, from_z, from_level;
    int from_type;
    const void *from_host;
    uint64_t from_device;
    void *from_array, *reserved0;
    size_t from_pitch, from_height;
    size_t to_x, to_y, to_z, to_level;
    int to_type;
    void *to_host;
    uint64_t to_device;
    void *to_array, *reserved1;
    size_t to_pitch, to_height;
    size_t width, height, depth;
};
// Rows from one place to another, each of the device or pinned; nothing if they cannot be copied.
static Work copy(const Copy3D &copy) {
    constexpr int HOST = 1, DEVICE = 2;
    bool plain = copy.height > 0 && copy.depth == 1 && copy.from_pitch >= copy.width && copy.to_pitch >= copy.width &&
                 copy.from_pitch <= INT32_MAX && copy.to_pitch <= INT32_MAX;
    if (!plain) return nullptr;
    auto place = [&](int type, uint64_t device, const void *host, size_t pitch) -> char * {
        size_t bytes = (copy.height - 1) * pitch + copy.width;
        if (type == HOST) return is_pinned(host, bytes) ? (char *)host : nullptr;
        if (type != DEVICE) return nullptr;
        if (is_device(device, bytes)) return (char *)device;
        outside("rows", device, bytes);
        return nullptr;
    };
    char *from = place(copy.from_type, copy.from_device, copy.from_host, copy.from_pitch);
    char *to = place(copy.to_type, copy.to_device, copy.to_host, copy.to_pitch);
    if (!from || !to) return nullptr;
    return [=, rows = copy.height, from_pitch = copy.from_pitch, to_pitch = copy.to_pitch, width = copy.width] {
        for (size_t row = 0; row < rows; row++) memmove(to + row * to_pitch, from + row * from_pitch, width);
        return 0;
    };
}
CU cuGraphAddMemcpyNode(Node **to, Graph *graph, Node *const *behind, size_t count, const Copy3D *given, void *) {
    Guard guard(lock);
    if (int result = entered()) return result;
    return add(to, graph, behind, count, copy(*given), Node::COPY);
}

// As cuda.h has it.
struct Memset {
    uint64_t to;
    size_t pitch;
    unsigned value, size;
    size_t width, height;
};
CU cuGraphAddMemsetNode(Node **to, Graph *graph, Node *const *behind, size_t count, const Memset *given, void *) {
    Guard guard(lock);
    if (int result = entered()) return result;
    Memset set = *given;
    bool fits = set.size == 4 || ((set.size == 1 || set.size == 2) && set.value >> 8 * set.size == 0);
    if (!fits || set.height != 1) return INVALID_VALUE;
    if (!is_device(set.to, set.width * set.size)) return outside("a memset", set.to, set.width * set.size);
    Work work = [=] {
        for (size_t i = 0; i < set.width; i++) memcpy((char *)set.to + i * set.size, &set.value, set.size);
        return 0;
    };
    return add(to, graph, behind, count, std::move(work), Node::SET);
}

CU cuGraphInstantiateWithFlags(Ready **to, Graph *graph, unsigned long long) {
    Guard guard(lock);
    if (int result = entered()) return result;
    if (setting("GRAFT_DRIVER_GRAPHS", 1) == 0) return OUT_OF_MEMORY;
    *to = new Ready;
    for (Node *node : graph->nodes) (*to)->works.emplace_back(node, node->work);
    return SUCCESS;
}
CU cuGraphExecDestroy(Ready *ready) {
    delete ready;
    return SUCCESS;
}
static int change(Ready *ready, Node *node, Node::Kind kind, Work other) {
    for (auto &[of, work] : ready->works) {
        if (of != node) continue;
        if (!other || node->kind != kind) return INVALID_VALUE;
        work = std::move(other);
        return SUCCESS;
    }
    return INVALID_VALUE;
}
CU cuGraphExecKernelNodeSetParams_v2(Ready *ready, Node *node, const KernelNode *given) {
    Guard guard(lock);
    if (int result = entered()) return result;
    return change(ready, node, Node::KERNEL, launch(*given));
}
CU cuGraphExecMemcpyNodeSetParams(Ready *ready, Node *node, const Copy3D *given, void *) {
    Guard guard(lock);
    if (int result = entered()) return result;
    // Only what lies in one row may get other places.
    return change(ready, node, Node::COPY, given->height == 1 ? copy(*given) : nullptr);
}
CU cuGraphLaunch(Ready *ready, void *) {
    Guard guard(lock);
    if (int result = entered()) return result;
    counts.graphs++;
    for (auto &[node, work] : ready->works) put(work);
    return SUCCESS;
}
