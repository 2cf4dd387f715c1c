//! Safe faces of the C++ shim (`csrc/shim.cpp`), which reaches what tch does not expose.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};

use hvd_core::Memory;
use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::{Error, Result};

/// What autocast was before, on this thread.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AutocastState {
    enabled: c_int,
    dtype: c_int,
    cache: c_int,
}

type List = *const *mut C_tensor;

unsafe extern "C" {
    fn hvd_shim_error() -> *const c_char;
    fn hvd_hook_set(
        leaf: *mut C_tensor,
        call: extern "C" fn(*mut c_void),
        drop: extern "C" fn(*mut c_void),
        context: *mut c_void,
    ) -> c_int;
    fn hvd_hook_remove(leaf: *mut C_tensor) -> c_int;
    fn hvd_grad_data(leaf: *mut C_tensor, data: *mut *mut c_void) -> c_int;
    fn hvd_grad_defined(leaf: *mut C_tensor, defined: *mut c_int) -> c_int;
    fn hvd_grad_set(leaf: *mut C_tensor, grad: *mut C_tensor) -> c_int;
    fn hvd_grad_place(leaf: *mut C_tensor, place: *mut C_tensor) -> c_int;
    fn hvd_grad_begin(leaf: *mut C_tensor, begins: *mut c_int) -> c_int;
    fn hvd_grad_enabled() -> c_int;
    fn hvd_differentiate(
        inputs: List,
        input_count: usize,
        outputs: List,
        output_count: usize,
        call: extern "C" fn(*mut c_void, List, usize, *mut *mut C_tensor, usize) -> c_int,
        drop: extern "C" fn(*mut c_void),
        context: *mut c_void,
    ) -> c_int;
    fn hvd_shim_set_error(message: *const c_char);
    fn hvd_backward(roots: List, grads: List, count: usize, retain_graph: c_int) -> c_int;
    fn hvd_autocast_enter(cuda: c_int, dtype: c_int, before: *mut AutocastState) -> c_int;
    fn hvd_autocast_dtype(cuda: c_int) -> c_int;
    fn hvd_autocast_exit(cuda: c_int, before: *const AutocastState) -> c_int;
    fn hvd_foreach_zero(tensors: List, count: usize) -> c_int;
    fn hvd_foreach_mul(tensors: List, count: usize, factor: f64) -> c_int;
    fn hvd_foreach_norm(tensors: List, count: usize, norms: *mut f64) -> c_int;
    fn hvd_squared_norm(flat: *mut C_tensor, result: *mut f64) -> c_int;
    fn hvd_fused_adamw(
        params: List,
        grads: List,
        exp_avgs: List,
        exp_avg_sqs: List,
        steps: List,
        count: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
    ) -> c_int;
    fn hvd_parallel_for(
        count: i64,
        grain: i64,
        call: extern "C" fn(*mut c_void, i64, i64),
        context: *mut c_void,
    ) -> c_int;
    fn hvd_set_deterministic(on: c_int, warn_only: c_int) -> c_int;
    fn hvd_over_memory(
        data: *mut c_void,
        count: i64,
        drop: extern "C" fn(*mut c_void),
        context: *mut c_void,
        result: *mut *mut C_tensor,
    ) -> c_int;
    fn hvd_dlopen(name: *const c_char) -> *const c_char;
}

/// The shim takes `at::Tensor *` and changes what the tensor refers to, never the reference itself, which is why a
/// shared reference suffices, as it does for tch's own in-place operations on shallow clones.
fn raw(tensor: &Tensor) -> *mut C_tensor {
    tensor.as_ptr().cast_mut()
}

fn raw_list<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<*mut C_tensor> {
    tensors.into_iter().map(raw).collect()
}

fn check(status: c_int) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the shim gives a terminated string that lives until the next failure on this thread.
    let message = unsafe { CStr::from_ptr(hvd_shim_error()) };
    Err(Error::torch(&message.to_string_lossy()))
}

/// A closure that a hook calls; on the thread that runs backward (CPU) or on the device's engine thread (CUDA).
pub(crate) type HookFn = Box<dyn Fn() + Send + Sync>;

extern "C" fn call_hook(context: *mut c_void) {
    // SAFETY: `hook_set` made the context from a boxed `HookFn`, which lives until `drop_hook`.
    let hook = unsafe { &*context.cast::<HookFn>() };
    // A panic must not unwind into C++. The process's panic hook has reported it; a hook that wants the caller of
    // backward to hear of it catches panics itself.
    let _ = catch_unwind(AssertUnwindSafe(hook));
}

extern "C" fn drop_hook(context: *mut c_void) {
    // SAFETY: as in `call_hook`; the shim calls this once, last.
    let hook = unsafe { Box::from_raw(context.cast::<HookFn>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(hook)));
}

extern "C" fn drop_memory(context: *mut c_void) {
    // SAFETY: `over_memory` made the context from a boxed `Memory`; the shim calls this once, last.
    let memory = unsafe { Box::from_raw(context.cast::<Memory>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(memory)));
}

/// A tensor of bytes over all of `memory`, which it keeps.
pub(crate) fn over_memory(memory: Memory) -> Result<Tensor> {
    let (data, count) = (memory.as_ptr().cast(), memory.len() as i64);
    let (context, mut tensor) = (Box::into_raw(Box::new(memory)).cast(), null_mut());
    // SAFETY: the shim owns the context from here on, also when it fails; the context keeps the data valid.
    check(unsafe { hvd_over_memory(data, count, drop_memory, context, &mut tensor) })?;
    // SAFETY: the shim made the tensor for us.
    Ok(unsafe { Tensor::from_ptr(tensor) })
}

pub(crate) fn hook_set(leaf: &Tensor, hook: HookFn) -> Result<()> {
    let context = Box::into_raw(Box::new(hook)).cast();
    // SAFETY: the shim owns the context from here on, also when it fails, and gives it to these functions alone.
    check(unsafe { hvd_hook_set(raw(leaf), call_hook, drop_hook, context) })
}

pub(crate) fn hook_remove(leaf: &Tensor) -> Result<()> {
    // SAFETY: a live tensor.
    check(unsafe { hvd_hook_remove(raw(leaf)) })
}

/// The address of the gradient's first element; null without a (dense) gradient.
pub(crate) fn grad_data(leaf: &Tensor) -> Result<*mut c_void> {
    let mut data = null_mut();
    // SAFETY: a live tensor, a place to write to.
    check(unsafe { hvd_grad_data(raw(leaf), &mut data) })?;
    Ok(data)
}

pub(crate) fn grad_defined(leaf: &Tensor) -> Result<bool> {
    let mut defined = 0;
    // SAFETY: as above.
    check(unsafe { hvd_grad_defined(raw(leaf), &mut defined) })?;
    Ok(defined != 0)
}

pub(crate) fn grad_set(leaf: &Tensor, grad: Option<&Tensor>) -> Result<()> {
    // SAFETY: live tensors; null means none.
    check(unsafe { hvd_grad_set(raw(leaf), grad.map_or(null_mut(), raw)) })
}

pub(crate) fn grad_place(leaf: &Tensor, place: &Tensor) -> Result<()> {
    // SAFETY: live tensors.
    check(unsafe { hvd_grad_place(raw(leaf), raw(place)) })
}

/// Gives `leaf` a gradient of any values where it has none; whether it did.
pub(crate) fn grad_begin(leaf: &Tensor) -> Result<bool> {
    let mut begins = 0;
    // SAFETY: a live tensor, a place to write to.
    check(unsafe { hvd_grad_begin(raw(leaf), &mut begins) })?;
    Ok(begins != 0)
}

/// Gets the gradients of a function's results and gives those of its inputs.
pub(crate) type BackwardFn = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send>;

extern "C" fn call_backward(
    context: *mut c_void,
    grads: List,
    count: usize,
    input_grads: *mut *mut C_tensor,
    inputs: usize,
) -> c_int {
    // SAFETY: `differentiate` made the context from a boxed `BackwardFn`, which lives until `drop_backward`; the shim's lock lets one
    // thread at a time come here.
    let backward = unsafe { &*context.cast::<BackwardFn>() };
    let run = || {
        // SAFETY: the shim gives `count` live tensors.
        let grads: Vec<_> = (0..count).map(|at| unsafe { Tensor::clone_from_ptr(*grads.add(at)) }).collect();
        backward(&grads)
    };
    let reason = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(made)) if made.len() == inputs => {
            for (at, mut grad) in made.into_iter().enumerate() {
                // SAFETY: the shim gives room for `inputs` pointers, and takes over what they point to.
                unsafe { *input_grads.add(at) = grad.as_mut_ptr() };
                std::mem::forget(grad);
            }
            return 0;
        }
        Ok(Ok(made)) => format!("backward gave {} gradients for {inputs} inputs", made.len()),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "a backward pass of hvd-torch panicked; the message is above".to_string(),
    };
    let reason = CString::new(reason.replace('\0', " ")).unwrap_or_default();
    // SAFETY: a terminated string, which is copied.
    unsafe { hvd_shim_set_error(reason.as_ptr()) };
    -1
}

extern "C" fn drop_backward(context: *mut c_void) {
    // SAFETY: as in `call_backward`; the shim calls this once, last.
    let backward = unsafe { Box::from_raw(context.cast::<BackwardFn>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(backward)));
}

/// Whether operations are being recorded for a backward pass, on this thread.
pub(crate) fn grad_enabled() -> bool {
    // SAFETY: takes nothing.
    unsafe { hvd_grad_enabled() != 0 }
}

/// Has a backward pass through `outputs`, which must be new tensors, give the gradients of `inputs` by `backward`.
pub(crate) fn differentiate(inputs: &[&Tensor], outputs: &[Tensor], backward: BackwardFn) -> Result<()> {
    let context = Box::into_raw(Box::new(backward)).cast();
    let (inputs, outputs) = (raw_list(inputs.iter().copied()), raw_list(outputs));
    let (count, results) = (inputs.len(), outputs.len());
    // SAFETY: two lists of live tensors; the shim owns the context from here on and gives it to these functions alone.
    check(unsafe {
        hvd_differentiate(inputs.as_ptr(), count, outputs.as_ptr(), results, call_backward, drop_backward, context)
    })
}

pub(crate) fn backward(roots: &[&Tensor], grads: &[Option<&Tensor>], retain_graph: bool) -> Result<()> {
    debug_assert_eq!(roots.len(), grads.len());
    let roots = raw_list(roots.iter().copied());
    let grads: Vec<_> = grads.iter().map(|grad| grad.map_or(null_mut(), raw)).collect();
    // SAFETY: two lists of `count` live tensors.
    check(unsafe { hvd_backward(roots.as_ptr(), grads.as_ptr(), roots.len(), retain_graph.into()) })
}

pub(crate) fn autocast_enter(cuda: bool, dtype: c_int) -> Result<AutocastState> {
    let mut before = AutocastState::default();
    // SAFETY: a place to write to.
    check(unsafe { hvd_autocast_enter(cuda.into(), dtype, &mut before) })?;
    Ok(before)
}

/// The `c10::ScalarType` that operations on the CPU (or CUDA) are cast to, on this thread; negative where they are not.
pub(crate) fn autocast_dtype(cuda: bool) -> c_int {
    // SAFETY: a plain number.
    unsafe { hvd_autocast_dtype(cuda.into()) }
}

pub(crate) fn autocast_exit(cuda: bool, before: &AutocastState) -> Result<()> {
    // SAFETY: a value that `autocast_enter` wrote.
    check(unsafe { hvd_autocast_exit(cuda.into(), before) })
}

pub(crate) fn foreach_zero(tensors: &[Tensor]) -> Result<()> {
    if tensors.is_empty() {
        return Ok(()); // torch refuses an empty list
    }
    let list = raw_list(tensors);
    // SAFETY: a list of `count` live tensors; so below.
    check(unsafe { hvd_foreach_zero(list.as_ptr(), list.len()) })
}

pub(crate) fn foreach_mul(tensors: &[Tensor], factor: f64) -> Result<()> {
    if tensors.is_empty() {
        return Ok(()); // torch refuses an empty list
    }
    let list = raw_list(tensors);
    // SAFETY: as above.
    check(unsafe { hvd_foreach_mul(list.as_ptr(), list.len(), factor) })
}

pub(crate) fn foreach_norm(tensors: &[Tensor]) -> Result<Vec<f64>> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let list = raw_list(tensors);
    let mut norms = vec![0.0; list.len()];
    // SAFETY: as above; one number for each.
    check(unsafe { hvd_foreach_norm(list.as_ptr(), list.len(), norms.as_mut_ptr()) })?;
    Ok(norms)
}

pub(crate) fn squared_norm(flat: &Tensor) -> Result<f64> {
    let mut result = 0.0;
    // SAFETY: a live tensor, a place to write to.
    check(unsafe { hvd_squared_norm(raw(flat), &mut result) })?;
    Ok(result)
}

/// The numbers of an AdamW update.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWConstants {
    pub lr: f64,
    pub betas: (f64, f64),
    pub weight_decay: f64,
    pub eps: f64,
}

/// The tensors of an AdamW update, parameter by parameter. All of one dtype on one device, except for `steps` (f32).
#[derive(Debug, Default)]
pub(crate) struct AdamWLists {
    params: Vec<*mut C_tensor>,
    grads: Vec<*mut C_tensor>,
    exp_avgs: Vec<*mut C_tensor>,
    exp_avg_sqs: Vec<*mut C_tensor>,
    steps: Vec<*mut C_tensor>,
}

impl AdamWLists {
    pub(crate) fn push(&mut self, param: &Tensor, grad: &Tensor, state: [&Tensor; 3]) {
        self.params.push(raw(param));
        self.grads.push(raw(grad));
        self.exp_avgs.push(raw(state[0]));
        self.exp_avg_sqs.push(raw(state[1]));
        self.steps.push(raw(state[2]));
    }

    /// Updates the parameters.
    ///
    /// # Safety
    /// The tensors that were pushed must still be alive.
    pub(crate) unsafe fn update(&self, k: &AdamWConstants) -> Result<()> {
        // SAFETY: five lists of equal length; the tensors live.
        check(unsafe {
            hvd_fused_adamw(
                self.params.as_ptr(),
                self.grads.as_ptr(),
                self.exp_avgs.as_ptr(),
                self.exp_avg_sqs.as_ptr(),
                self.steps.as_ptr(),
                self.params.len(),
                k.lr,
                k.betas.0,
                k.betas.1,
                k.weight_decay,
                k.eps,
            )
        })
    }
}

/// See [`crate::parallel_for`].
pub(crate) fn parallel_for(count: usize, grain: usize, body: &(dyn Fn(Range<usize>) + Sync)) -> Result<()> {
    struct Call<'a> {
        body: &'a (dyn Fn(Range<usize>) + Sync),
        panicked: AtomicBool,
    }
    extern "C" fn run(context: *mut c_void, begin: i64, end: i64) {
        // SAFETY: the context is the value below, which outlives the loop; threads only read it.
        let call = unsafe { &*context.cast::<Call>() };
        if catch_unwind(AssertUnwindSafe(|| (call.body)(begin as usize..end as usize))).is_err() {
            call.panicked.store(true, Ordering::Relaxed);
        }
    }
    let call = Call { body, panicked: AtomicBool::new(false) };
    let context = (&raw const call).cast_mut().cast();
    // SAFETY: `run` may be called from several threads at once, and has returned everywhere when this does.
    check(unsafe { hvd_parallel_for(count as i64, grain as i64, run, context) })?;
    match call.panicked.into_inner() {
        false => Ok(()),
        true => Err(Error::invalid("a part of a loop panicked; the message is above")),
    }
}

pub(crate) fn set_deterministic(on: bool, warn_only: bool) -> Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { hvd_set_deterministic(on.into(), warn_only.into()) })
}

/// Loads a library for the whole process; the error is the system's reason.
pub(crate) fn dlopen(name: &str) -> std::result::Result<(), String> {
    let name = CString::new(name).map_err(|error| error.to_string())?;
    // SAFETY: a terminated string in; null or a terminated string out. The library's initialisers run: it is libtorch's.
    let reason = unsafe { hvd_dlopen(name.as_ptr()) };
    if reason.is_null() {
        return Ok(());
    }
    // SAFETY: not null, see above.
    Err(unsafe { CStr::from_ptr(reason) }.to_string_lossy().into_owned())
}
