//! The few types that the kernel asks of programs with a timer (BTF, `Documentation/bpf/btf.rst` of the kernel): of the map that
//! holds it, and that functions which a timer calls are functions.

/// Numbers of the types, in their order.
pub(super) const KEY: u32 = 1;
const KERNELS_TIMER: u32 = 2;
pub(super) const TIMER: u32 = 3;
const PROTOTYPE: u32 = 4;
pub(super) const FUNCTION: u32 = 5;

/// Kinds of types, as `include/uapi/linux/btf.h` numbers them.
const INT: u32 = 1;
const STRUCT: u32 = 4;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;

/// Bytes of the kernel's `struct bpf_timer`.
pub(super) const TIMER_BYTES: u32 = 16;

/// All of them, as the kernel reads them.
pub(super) fn types() -> Vec<u8> {
    let mut strings = vec![0];
    let mut name = |name: &str| {
        let at = strings.len() as u32;
        strings.extend(name.bytes().chain([0]));
        at
    };
    let words = [
        // Its size, and its bits.
        vec![name("int"), INT << 24, 4, 32],
        vec![name("bpf_timer"), STRUCT << 24, TIMER_BYTES],
        vec![
            name("element"),
            STRUCT << 24 | 1,
            TIMER_BYTES,
            name("timer"),
            KERNELS_TIMER,
            0,
        ],
        vec![0, FUNC_PROTO << 24, KEY],
        // Static, as what a timer calls must be.
        vec![name("program"), FUNC << 24, PROTOTYPE],
    ]
    .concat();
    let (types, strings_length) = (words.len() as u32 * 4, strings.len() as u32);
    let header = [24, 0, types, types, strings_length];
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    bytes.extend(header.into_iter().chain(words).flat_map(u32::to_le_bytes));
    bytes.extend(strings);
    bytes
}
