// From Rust, by the C interface:
//
//     fastdtd embed squeezenet1_1 -o lib --name net
//     rustc --edition 2021 -O explain.rs -L lib -l static=net -o explain
//     ./explain INPUT.f32                            (C, H, W) float32, as net_preprocess_rgb makes it
use std::ffi::{c_char, c_int, c_void, CStr};

extern "C" {
    fn net_workspace_bytes() -> usize;
    fn net_input_shape(shape: *mut c_int);
    fn net_classes() -> c_int;
    fn net_class_name(index: c_int) -> *const c_char;
    fn net_error(code: c_int) -> *const c_char;
    fn net_explain(weights: *const c_void, input: *const f32, target: c_int, output: *mut f32, relevance: *mut f32,
                   absorbed: *mut f32, workspace: *mut c_void) -> c_int;
}

#[repr(C, align(64))]
#[derive(Clone)]
struct Line([u8; 64]);

fn main() {
    let path = std::env::args().nth(1).expect("usage: explain INPUT.f32");
    let bytes = std::fs::read(path).expect("the input cannot be read");
    let input: Vec<f32> = bytes.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect();
    let mut shape = [0; 3];
    let (size, classes, lines) = unsafe {
        net_input_shape(shape.as_mut_ptr());
        (shape.iter().product::<c_int>() as usize, net_classes() as usize, (net_workspace_bytes() + 63) / 64)
    };
    assert_eq!(input.len(), size, "the input has not as many floats as the network reads");
    let (mut scores, mut relevance, mut absorbed) = (vec![0f32; classes], vec![0f32; size], 0f32);
    let mut workspace = vec![Line([0; 64]); lines];
    let code = unsafe {
        net_explain(std::ptr::null(), input.as_ptr(), -1, scores.as_mut_ptr(), relevance.as_mut_ptr(), &mut absorbed,
                    workspace.as_mut_ptr().cast())
    };
    assert!(code == 0, "{}", unsafe { CStr::from_ptr(net_error(code)) }.to_string_lossy());
    let winner = (0..classes).max_by(|&i, &j| scores[i].total_cmp(&scores[j])).unwrap();
    let name = unsafe { net_class_name(winner as c_int) };
    let name = if name.is_null() { winner.to_string() } else { unsafe { CStr::from_ptr(name) }.to_string_lossy().into() };
    let sum: f64 = relevance.iter().map(|&value| f64::from(value)).sum();
    println!("{name}, score {:.4}, relevance {sum:.4}, absorbed {absorbed:.4}", scores[winner]);
}
