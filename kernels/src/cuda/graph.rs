//! Work as a graph of the driver's: sent by one call, with arguments that can be set anew.

use std::ffi::c_void;

use cudarc::driver::sys::{self, CUgraph, CUgraphExec, CUgraphNode, CUmemorytype, CUresult};

use super::Result;
use super::driver::{Driver, check};
use super::gpu::Limits;
use super::work::{Task, Work};

/// A graph, ready to be launched. [`Driver::forget`] gives it back.
#[derive(Debug)]
pub(super) struct Graph {
    /// Names the nodes
    plan: CUgraph,
    ready: CUgraphExec,
    /// A node for each task
    nodes: Vec<CUgraphNode>,
}

// SAFETY: handles of the driver may be used from any thread, one at a time.
unsafe impl Send for Graph {}

/// One side of a copy: memory of the device, or pinned memory of this machine.
#[derive(Clone, Copy)]
enum Side {
    /// An address, and the bytes from one row to the next
    Device(u64, usize),
    Pinned(u64),
}

impl Side {
    /// Kind of memory, address if it is the device's, address if it is this machine's, bytes between rows.
    fn parts(self, length: usize) -> (CUmemorytype, u64, *mut c_void, usize) {
        match self {
            Side::Device(address, step) => {
                let null = std::ptr::null_mut();
                (CUmemorytype::CU_MEMORYTYPE_DEVICE, address, null, step)
            }
            Side::Pinned(address) => {
                let address = address as *mut c_void;
                (CUmemorytype::CU_MEMORYTYPE_HOST, 0, address, length)
            }
        }
    }
}

fn copy_of(from: Side, to: Side, rows: usize, length: usize) -> sys::CUDA_MEMCPY3D {
    let (src_type, src_device, src_host, src_step) = from.parts(length);
    let (dst_type, dst_device, dst_host, dst_step) = to.parts(length);
    sys::CUDA_MEMCPY3D {
        srcXInBytes: 0,
        srcY: 0,
        srcZ: 0,
        srcLOD: 0,
        srcMemoryType: src_type,
        srcHost: src_host.cast_const(),
        srcDevice: src_device,
        srcArray: std::ptr::null_mut(),
        reserved0: std::ptr::null_mut(),
        srcPitch: src_step,
        srcHeight: rows,
        dstXInBytes: 0,
        dstY: 0,
        dstZ: 0,
        dstLOD: 0,
        dstMemoryType: dst_type,
        dstHost: dst_host,
        dstDevice: dst_device,
        dstArray: std::ptr::null_mut(),
        reserved1: std::ptr::null_mut(),
        dstPitch: dst_step,
        dstHeight: rows,
        WidthInBytes: length,
        Height: rows,
        Depth: 1,
    }
}

fn upload(from: u64, to: u64, bytes: usize) -> sys::CUDA_MEMCPY3D {
    copy_of(Side::Pinned(from), Side::Device(to, bytes), 1, bytes)
}

fn readback(from: u64, to: u64, bytes: usize) -> sys::CUDA_MEMCPY3D {
    copy_of(Side::Device(from, bytes), Side::Pinned(to), 1, bytes)
}

/// Bytes that follow each other as rows, of which a driver takes none of 2^31 bytes or more: how many, and how long.
fn in_rows(bytes: usize) -> (usize, usize) {
    let least = bytes.div_ceil(1 << 30);
    let rows = (least..least + 4096).find(|&rows| rows > 0 && bytes.is_multiple_of(rows));
    let rows = rows.unwrap_or(1);
    (rows, bytes / rows)
}

impl Driver {
    /// The parameters of a kernel's node, which point into `work` and `pointers`.
    fn kernel(
        &self,
        limits: &Limits,
        task: &Task,
        parameters: *mut *mut c_void,
    ) -> Result<sys::CUDA_KERNEL_NODE_PARAMS> {
        let Task::Kernel {
            file, name, launch, ..
        } = *task
        else {
            unreachable!("the caller has seen that it is a kernel");
        };
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        Ok(sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.function(limits, file, name, launch.shared)?,
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: launch.shared,
            kernelParams: parameters,
            extra: std::ptr::null_mut(),
            kern: std::ptr::null_mut(),
            ctx: std::ptr::null_mut(),
        })
    }

    /// Makes a graph of `work`, each task behind the one before it.
    ///
    /// # Errors
    /// A failed call: among others, no more memory for graphs.
    pub fn graph(&self, limits: &Limits, work: &Work) -> Result<Graph> {
        self.enter()?;
        let mut graph = Graph {
            plan: std::ptr::null_mut(),
            ready: std::ptr::null_mut(),
            nodes: Vec::with_capacity(work.tasks.len()),
        };
        let made = self.assemble(limits, work, &mut graph);
        match made {
            Ok(()) => Ok(graph),
            Err(error) => {
                self.forget(graph);
                Err(error)
            }
        }
    }

    fn assemble(&self, limits: &Limits, work: &Work, graph: &mut Graph) -> Result<()> {
        // SAFETY: a valid pointer.
        check("cuGraphCreate", unsafe {
            sys::cuGraphCreate(&mut graph.plan, 0)
        })?;
        for task in &work.tasks {
            let before = graph.nodes.last().copied();
            let (behind, count) = match &before {
                Some(node) => (std::ptr::from_ref(node), 1),
                None => (std::ptr::null(), 0),
            };
            let (plan, context) = (graph.plan, self.context());
            let mut node = std::ptr::null_mut();
            let copy = |node: *mut CUgraphNode, copy: sys::CUDA_MEMCPY3D| -> CUresult {
                // SAFETY: ranges of the device, which `Gpu` checks, or pinned ones, a graph and a node of it.
                unsafe { sys::cuGraphAddMemcpyNode(node, plan, behind, count, &copy, context) }
            };
            let result = match *task {
                Task::Kernel { first, end, .. } => {
                    let mut pointers = work.pointers(first, end);
                    let kernel = self.kernel(limits, task, pointers.as_mut_ptr())?;
                    // SAFETY: as in `Driver::launch`; the driver copies what the parameters point to.
                    unsafe { sys::cuGraphAddKernelNode_v2(&mut node, plan, behind, count, &kernel) }
                }
                Task::Copy { from, to, bytes } => {
                    let (rows, length) = in_rows(bytes);
                    let (from, to) = (Side::Device(from, length), Side::Device(to, length));
                    copy(&mut node, copy_of(from, to, rows, length))
                }
                Task::Rows {
                    rows,
                    length,
                    from,
                    to,
                } => {
                    let (from, to) = (Side::Device(from.0, from.1), Side::Device(to.0, to.1));
                    copy(&mut node, copy_of(from, to, rows, length))
                }
                Task::Fill {
                    to,
                    count: elements,
                    size,
                    value,
                } => {
                    let fill = sys::CUDA_MEMSET_NODE_PARAMS {
                        dst: to,
                        pitch: elements * size,
                        value: value & (u32::MAX >> (32 - 8 * size)),
                        elementSize: size as u32,
                        width: elements,
                        height: 1,
                    };
                    // SAFETY: a range of the device, a graph and a node of it.
                    unsafe {
                        sys::cuGraphAddMemsetNode(&mut node, plan, behind, count, &fill, context)
                    }
                }
                Task::Upload { place, to, bytes } => {
                    copy(&mut node, upload(work.pinned(place), to, bytes))
                }
                Task::Readback { from, place, bytes } => {
                    copy(&mut node, readback(from, work.pinned(place), bytes))
                }
            };
            check("adding to a graph", result)?;
            graph.nodes.push(node);
        }
        // SAFETY: a valid pointer and a graph.
        check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut graph.ready, graph.plan, 0)
        })
    }

    /// Sets the arguments of task number `task` to those of `work`, for launches from now on.
    ///
    /// # Errors
    /// A failed call.
    pub fn set_arguments(
        &self,
        limits: &Limits,
        graph: &mut Graph,
        work: &Work,
        task: usize,
    ) -> Result<()> {
        self.enter()?;
        let node = graph.nodes[task];
        let set_copy = |copy: sys::CUDA_MEMCPY3D| {
            // SAFETY: as where the node was added; a graph and its own node.
            check("cuGraphExecMemcpyNodeSetParams", unsafe {
                sys::cuGraphExecMemcpyNodeSetParams(graph.ready, node, &copy, self.context())
            })
        };
        match work.tasks[task] {
            Task::Kernel { first, end, .. } => {
                let mut pointers = work.pointers(first, end);
                let kernel = self.kernel(limits, &work.tasks[task], pointers.as_mut_ptr())?;
                // SAFETY: as in `Driver::launch`; a graph and its own node.
                check("cuGraphExecKernelNodeSetParams", unsafe {
                    sys::cuGraphExecKernelNodeSetParams_v2(graph.ready, node, &kernel)
                })
            }
            Task::Upload { place, to, bytes } => set_copy(upload(work.pinned(place), to, bytes)),
            Task::Readback { from, place, bytes } => {
                set_copy(readback(from, work.pinned(place), bytes))
            }
            // Nothing of these could differ.
            Task::Copy { .. } | Task::Rows { .. } | Task::Fill { .. } => Ok(()),
        }
    }

    /// Sends a graph's work behind what was sent before.
    ///
    /// # Errors
    /// A failed call.
    pub fn launch_graph(&self, graph: &Graph) -> Result<()> {
        self.enter()?;
        // SAFETY: a graph and a stream of one device.
        check("cuGraphLaunch", unsafe {
            sys::cuGraphLaunch(graph.ready, self.stream().cast())
        })
    }

    /// Gives a graph back; the driver waits for it if it is at work.
    pub fn forget(&self, graph: Graph) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: made by `graph`, or null. A failure leaves nothing to be done.
        unsafe {
            if !graph.ready.is_null() {
                sys::cuGraphExecDestroy(graph.ready);
            }
            if !graph.plan.is_null() {
                sys::cuGraphDestroy(graph.plan);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_copies_are_rows_that_drivers_take() {
        for bytes in [1, 4096, 1 << 30, (1 << 30) + 4] {
            let (rows, length) = in_rows(bytes);
            assert_eq!(rows * length, bytes);
            assert!(bytes > 1 << 30 || rows == 1, "{bytes}: {rows} rows");
        }
        // Weights and logits: 128,256 x 4096 and 65,536 x 50,257 in f32, and more.
        for bytes in [128_256 * 4096 * 4, 65_536 * 50_257 * 4, 1 << 37, 3 << 31] {
            let (rows, length) = in_rows(bytes);
            assert_eq!(rows * length, bytes);
            assert!(length <= 1 << 30, "{bytes}: rows of {length}");
        }
    }
}
