//! The system calls that aya has none for: what `bpf(2)` does for programs that stand for functions of the kernel (`struct_ops`).

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use aya_obj::generated::{
    BPF_F_LINK, BPF_F_SLEEPABLE, bpf_attach_type, bpf_attr, bpf_cmd, bpf_func_info, bpf_map_type, bpf_prog_type,
};
use nix::libc;

use super::link::Program;
use super::types;

/// What the kernel may say of a program that it refuses, in bytes.
const LOG: usize = 1 << 20;

/// How much of its end is told, in lines.
const LOG_LINES: usize = 10;

/// What a map holds, beside how many.
#[derive(Clone, Copy)]
pub(super) struct MapShape {
    pub(super) name: &'static str,
    pub(super) kind: bpf_map_type,
    pub(super) key: u32,
    pub(super) value: u32,
    pub(super) entries: u32,
    /// Whether the value is a timer, which the kernel must know.
    pub(super) timer: bool,
}

/// Makes a map.
pub(super) fn make_map(shape: &MapShape, types: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes = empty();
    // SAFETY: all of it is plain numbers.
    let map = unsafe { &mut attributes.__bindgen_anon_1 };
    map.map_type = shape.kind as u32;
    map.key_size = shape.key;
    map.value_size = shape.value;
    map.max_entries = shape.entries;
    name(&mut map.map_name, shape.name);
    if shape.timer {
        map.btf_fd = number(types);
        map.btf_key_type_id = types::KEY;
        map.btf_value_type_id = types::TIMER;
    }
    descriptor(bpf_cmd::BPF_MAP_CREATE, &attributes)
}

/// Makes the map that holds a structure of functions, of this type and size.
pub(super) fn make_functions(id: u32, size: u32, types: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes = empty();
    // SAFETY: all of it is plain numbers.
    let map = unsafe { &mut attributes.__bindgen_anon_1 };
    map.map_type = bpf_map_type::BPF_MAP_TYPE_STRUCT_OPS as u32;
    map.key_size = 4;
    map.value_size = size;
    map.max_entries = 1;
    map.map_flags = BPF_F_LINK;
    map.btf_fd = number(types);
    map.btf_vmlinux_value_type_id = id;
    name(&mut map.map_name, "stoker");
    descriptor(bpf_cmd::BPF_MAP_CREATE, &attributes)
}

/// Sets the one element of such a map.
pub(super) fn set_functions(map: BorrowedFd<'_>, value: &[u8]) -> io::Result<()> {
    let mut attributes = empty();
    let key = 0_u32;
    // SAFETY: all of it is plain numbers.
    let element = unsafe { &mut attributes.__bindgen_anon_2 };
    element.map_fd = number(map);
    element.key = &raw const key as u64;
    element.__bindgen_anon_1.value = value.as_ptr() as u64;
    call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &attributes).map(drop)
}

/// Lets the kernel call these functions, until what is returned is closed.
pub(super) fn link(map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes = empty();
    // SAFETY: all of it is plain numbers.
    let link = unsafe { &mut attributes.link_create };
    link.__bindgen_anon_1.map_fd = number(map);
    link.attach_type = bpf_attach_type::BPF_STRUCT_OPS as u32;
    descriptor(bpf_cmd::BPF_LINK_CREATE, &attributes)
}

/// Loads types.
pub(super) fn load_types(types: &[u8]) -> io::Result<OwnedFd> {
    let mut attributes = empty();
    // SAFETY: all of it is plain numbers.
    let load = unsafe { &mut attributes.__bindgen_anon_7 };
    load.btf = types.as_ptr() as u64;
    load.btf_size = size(types.len());
    descriptor(bpf_cmd::BPF_BTF_LOAD, &attributes)
}

/// Loads a program that stands for a function: a member of this structure, by number.
///
/// # Errors
/// What the kernel says of it.
pub(super) fn load(program: &Program, structure: u32, member: u32, types: BorrowedFd<'_>) -> Result<OwnedFd, Refused> {
    let functions: Vec<_> = [0]
        .into_iter()
        .chain(program.callback)
        .map(|insn_off| bpf_func_info {
            insn_off,
            type_id: types::FUNCTION,
        })
        .collect();
    let mut attributes = empty();
    // SAFETY: all of it is plain numbers.
    let load = unsafe { &mut attributes.__bindgen_anon_3 };
    load.prog_type = bpf_prog_type::BPF_PROG_TYPE_STRUCT_OPS as u32;
    load.insn_cnt = size(program.code.len());
    load.insns = program.code.as_ptr() as u64;
    load.license = c"GPL".as_ptr() as u64;
    load.prog_flags = if program.sleepable { BPF_F_SLEEPABLE } else { 0 };
    load.expected_attach_type = member;
    load.attach_btf_id = structure;
    load.prog_btf_fd = number(types);
    load.func_info_rec_size = size(size_of::<bpf_func_info>());
    load.func_info = functions.as_ptr() as u64;
    load.func_info_cnt = size(functions.len());
    name(&mut load.prog_name, program.name);
    let failed = match descriptor(bpf_cmd::BPF_PROG_LOAD, &attributes) {
        Ok(loaded) => return Ok(loaded),
        Err(source) => source,
    };
    // Once more, for what it says.
    let mut log = vec![0_u8; LOG];
    // SAFETY: all of it is plain numbers.
    let load = unsafe { &mut attributes.__bindgen_anon_3 };
    load.log_buf = log.as_mut_ptr() as u64;
    load.log_size = size(log.len());
    load.log_level = 1;
    // It fails as it did before.
    let _ = descriptor(bpf_cmd::BPF_PROG_LOAD, &attributes);
    let said = log.split(|byte| *byte == 0).next().unwrap_or_default();
    let said = String::from_utf8_lossy(said);
    let lines: Vec<_> = said.lines().collect();
    let last = lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default();
    Err(Refused {
        source: failed,
        log: last.join("\n"),
    })
}

/// A program that the kernel does not take.
#[derive(Debug, thiserror::Error)]
#[error("{log}")]
pub(super) struct Refused {
    pub(super) source: io::Error,
    log: String,
}

fn empty() -> bpf_attr {
    // SAFETY: plain numbers of which all may be 0; those that a command has no use for must be.
    unsafe { mem::zeroed() }
}

fn name(place: &mut [libc::c_char], name: &str) {
    // The last stays 0.
    let room = place.len().saturating_sub(1);
    for (to, from) in place.iter_mut().take(room).zip(name.bytes()) {
        *to = from.cast_signed();
    }
}

/// What is here is far smaller.
fn size(size: usize) -> u32 {
    u32::try_from(size).unwrap_or(u32::MAX)
}

fn number(descriptor: impl AsFd) -> u32 {
    descriptor.as_fd().as_raw_fd().cast_unsigned()
}

/// A command that returns a file descriptor.
fn descriptor(command: bpf_cmd, attributes: &bpf_attr) -> io::Result<OwnedFd> {
    let descriptor = call(command, attributes)?;
    // SAFETY: the kernel has made it for this call, closed on exec.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn call(command: bpf_cmd, attributes: &bpf_attr) -> io::Result<i32> {
    // SAFETY: the attributes and all that they point to live for the length of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_int,
            &raw const *attributes,
            size_of::<bpf_attr>(),
        )
    };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}
