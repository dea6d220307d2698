//! What the scheduler needs of this kernel, by its own type information: functions, numbers, and where members lie.

use std::collections::HashMap;

use super::link::Symbol;
use crate::btf::{Btf, Names, Type};

/// The kernel's structure of functions, and what user space hands over of it.
const FUNCTIONS: &str = "sched_ext_ops";
const VALUE: &str = "bpf_struct_ops_sched_ext_ops";

/// Functions that have had other names, the last first.
const RENAMED: [(&str, &[&str]); 3] = [
    // The second returns nothing, which nobody looks at.
    (
        "scx_bpf_dsq_insert",
        &["scx_bpf_dsq_insert___v2", "scx_bpf_dsq_insert", "scx_bpf_dispatch"],
    ),
    (
        "scx_bpf_dsq_insert_vtime",
        &["scx_bpf_dsq_insert_vtime", "scx_bpf_dispatch_vtime"],
    ),
    (
        "scx_bpf_dsq_move_to_local",
        &["scx_bpf_dsq_move_to_local", "scx_bpf_consume"],
    ),
];

/// Where members lie: symbol, and the way to the member.
const MEMBERS: [(&str, &[(&str, &str)]); 8] = [
    ("TASK_TGID", &[("task_struct", "tgid")]),
    ("TASK_STATIC_PRIO", &[("task_struct", "static_prio")]),
    ("TASK_CPUS_PTR", &[("task_struct", "cpus_ptr")]),
    (
        "TASK_CPU_TIME",
        &[("task_struct", "se"), ("sched_entity", "sum_exec_runtime")],
    ),
    (
        "TASK_VTIME",
        &[("task_struct", "scx"), ("sched_ext_entity", "dsq_vtime")],
    ),
    ("EXIT_KIND", &[("scx_exit_info", "kind")]),
    ("EXIT_REASON", &[("scx_exit_info", "reason")]),
    ("EXIT_MESSAGE", &[("scx_exit_info", "msg")]),
];

/// What is known of this kernel's `sched_ext`.
pub(super) struct Kernel<'a> {
    btf: Btf<'a>,
    names: Names<'a>,
    offsets: HashMap<&'static str, u64>,
    /// The type of its structure of functions.
    pub(super) functions: Type<'a>,
    /// The type of what is handed over, and where in it the functions are.
    pub(super) value: Type<'a>,
    data: usize,
}

// === impl Kernel ===

impl<'a> Kernel<'a> {
    /// `None` where the kernel has no `sched_ext`.
    pub(super) fn new(types: &'a [u8]) -> Option<Self> {
        let btf = Btf::parse(types)?;
        let functions = btf.structures(FUNCTIONS).next()?;
        let value = btf.structures(VALUE).next()?;
        let data = btf.member(&value, "data")?.1?;
        let names = btf.names(|name| name.contains("scx_") || name.starts_with("SCX_"));
        let offsets = MEMBERS.into_iter().filter_map(|(symbol, way)| {
            let mut at = 0_u64;
            for (structure, member) in way {
                at += u64::from(btf.offset(structure, member)?);
            }
            Some((symbol, at))
        });
        Some(Self {
            offsets: offsets.collect(),
            functions,
            value,
            data: usize::try_from(data).ok()?,
            names,
            btf,
        })
    }

    /// What a symbol stands for that is no map.
    pub(super) fn resolve(&self, symbol: &str) -> Option<Symbol> {
        if let Some(offset) = self.offsets.get(symbol) {
            return Some(Symbol::Number(*offset));
        }
        if let Some(number) = self.number(symbol) {
            return Some(Symbol::Number(number));
        }
        let renamed = RENAMED.iter().find(|(name, _)| *name == symbol);
        let names = renamed.map_or(std::slice::from_ref(&symbol), |(_, names)| *names);
        let mut ids = names.iter().filter_map(|name| self.names.functions.get(name));
        ids.next().map(|id| Symbol::Function(*id))
    }

    /// Whether it leaves threads of `SCHED_EXT` a part of each CPU, by a server as it has for fair ones.
    pub(super) fn guarantees(&self) -> bool {
        self.btf.offset("rq", "ext_server").is_some()
    }

    /// A value of an enumeration.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.names.numbers.get(name).copied()
    }

    /// The number of a function, where this kernel has it.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        Some(self.btf.member(&self.functions, name)?.0)
    }

    /// Where in what is handed over a member lies.
    pub(super) fn place(&self, member: &str) -> Option<usize> {
        let at = self.btf.member(&self.functions, member)?.1?;
        self.data.checked_add(usize::try_from(at).ok()?)
    }
}
