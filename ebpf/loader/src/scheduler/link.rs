//! Links the compiled scheduler with the kernel that runs and with its maps. All that the object file does not have itself is a
//! symbol: a function of the kernel's, a map, or a number.

use std::os::fd::RawFd;

use aya_obj::generated::{BPF_PSEUDO_FUNC, BPF_PSEUDO_KFUNC_CALL, BPF_PSEUDO_MAP_FD};
use object::read::elf::ElfFile64;
use object::{Endianness, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SectionIndex};

/// What sections of programs are named before the function that they stand for; those that may sleep, and others.
const FUNCTION: &str = "struct_ops/";
const SLEEPABLE: &str = "struct_ops.s/";

/// The section of what the timer calls.
const CALLBACK: &str = "callback";

/// Bytes of an instruction.
const INSTRUCTION: usize = 8;

/// The operations that are linked: to call, and to load 64 bits.
const CALL: u8 = 0x85;
const LOAD: u8 = 0x18;

/// A program, ready to be loaded.
pub(super) struct Program {
    /// The function that it stands for.
    pub(super) name: &'static str,
    /// Whether it may sleep.
    pub(super) sleepable: bool,
    /// Its instructions.
    pub(super) code: Vec<[u8; INSTRUCTION]>,
    /// Where in it what the timer calls begins.
    pub(super) callback: Option<u32>,
}

/// What a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Symbol {
    /// A function of the kernel's: its type.
    Function(u32),
    /// A map.
    Map(RawFd),
    /// A number.
    Number(u64),
}

/// Why it can't be linked.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// Of a compiler's fault; tests would find it.
    #[error("the compiled scheduler is damaged: {0}")]
    Object(#[from] object::Error),
    #[error("the compiled scheduler is not what was expected: {0}")]
    Unexpected(&'static str),
    /// The kernel does not have it.
    #[error("this kernel has no {0}")]
    Missing(String),
}

type File = ElfFile64<'static, Endianness>;

/// Links all programs, by what symbols stand for.
pub(super) fn link(object: &'static [u8], resolve: impl Fn(&str) -> Option<Symbol>) -> Result<Vec<Program>, LinkError> {
    let file = File::parse(object)?;
    let mut programs = Vec::new();
    for section in file.sections() {
        let name = section.name()?;
        let (name, sleepable) = match (name.strip_prefix(FUNCTION), name.strip_prefix(SLEEPABLE)) {
            (Some(name), _) => (name, false),
            (_, Some(name)) => (name, true),
            _ => continue,
        };
        let mut linker = Linker {
            file: &file,
            resolve: &resolve,
            code: Vec::new(),
            callback: None,
        };
        linker.append(section.index())?;
        programs.push(Program {
            name,
            sleepable,
            code: linker.code,
            callback: linker.callback,
        });
    }
    Ok(programs)
}

struct Linker<'a, R> {
    file: &'a File,
    resolve: &'a R,
    code: Vec<[u8; INSTRUCTION]>,
    callback: Option<u32>,
}

// === impl Linker ===

impl<R: Fn(&str) -> Option<Symbol>> Linker<'_, R> {
    /// Appends a section's instructions, and whatever they refer to.
    fn append(&mut self, index: SectionIndex) -> Result<(), LinkError> {
        let section = self.file.section_by_index(index)?;
        let start = self.code.len();
        let (code, rest) = section.data()?.as_chunks::<INSTRUCTION>();
        if !rest.is_empty() {
            return Err(LinkError::Unexpected("a part of an instruction"));
        }
        self.code.extend(code);
        for (offset, relocation) in section.relocations() {
            let RelocationTarget::Symbol(symbol) = relocation.target() else {
                return Err(LinkError::Unexpected("a reference to no symbol"));
            };
            let symbol = self.file.symbol_by_index(symbol)?;
            let at = start + usize::try_from(offset).unwrap_or(usize::MAX) / INSTRUCTION;
            match symbol.section_index() {
                Some(section) => self.refer(at, section)?,
                None => self.resolve(at, symbol.name()?)?,
            }
        }
        Ok(())
    }

    /// Links an instruction with what the timer calls.
    fn refer(&mut self, at: usize, section: SectionIndex) -> Result<(), LinkError> {
        if self.file.section_by_index(section)?.name()? != CALLBACK {
            return Err(LinkError::Unexpected("a call of what was to be a part of a program"));
        }
        let start = match self.callback {
            Some(start) => start,
            None => {
                let start = size(self.code.len())?;
                self.callback = Some(start);
                self.append(section)?;
                start
            }
        };
        let from = size(at)? + 1;
        let distance = start
            .checked_sub(from)
            .ok_or(LinkError::Unexpected("a call of itself"))?;
        self.set(at, LOAD, BPF_PSEUDO_FUNC, distance)?;
        self.set_high(at, 0)
    }

    /// Links an instruction with what the object file does not have.
    fn resolve(&mut self, at: usize, name: &str) -> Result<(), LinkError> {
        let symbol = (self.resolve)(name).ok_or_else(|| LinkError::Missing(name.to_owned()))?;
        match symbol {
            Symbol::Function(id) => self.set(at, CALL, BPF_PSEUDO_KFUNC_CALL, id),
            Symbol::Map(map) => {
                self.set(at, LOAD, BPF_PSEUDO_MAP_FD, map.cast_unsigned())?;
                self.set_high(at, 0)
            }
            Symbol::Number(number) => {
                self.set(at, LOAD, 0, number as u32)?;
                self.set_high(at, (number >> 32) as u32)
            }
        }
    }

    /// Sets what an instruction refers to, and in which way.
    fn set(&mut self, at: usize, operation: u8, way: u32, value: u32) -> Result<(), LinkError> {
        let way = u8::try_from(way).map_err(|_| LinkError::Unexpected("an unknown way to refer"))?;
        let Some([code, registers, _, _, immediate @ ..]) = self.code.get_mut(at) else {
            return Err(LinkError::Unexpected("a reference from outside"));
        };
        if *code != operation {
            return Err(LinkError::Unexpected("a reference by another instruction"));
        }
        // Nothing adds to a symbol.
        if operation == LOAD && *immediate != [0; 4] {
            return Err(LinkError::Unexpected("a reference beside a symbol"));
        }
        *registers = *registers & 0xf | way << 4;
        *immediate = value.to_le_bytes();
        Ok(())
    }

    /// Sets the upper half of what is loaded.
    fn set_high(&mut self, at: usize, value: u32) -> Result<(), LinkError> {
        let Some([.., a, b, c, d]) = self.code.get_mut(at + 1) else {
            return Err(LinkError::Unexpected("half an instruction"));
        };
        [*a, *b, *c, *d] = value.to_le_bytes();
        Ok(())
    }
}

fn size(size: usize) -> Result<u32, LinkError> {
    u32::try_from(size).map_err(|_| LinkError::Unexpected("a program without end"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers for all that is not a function of the kernel's, which have names of this kind, or a map.
    fn any(name: &str) -> Option<Symbol> {
        Some(match name {
            "MACHINES" | "HOST" | "PROGRESS" | "RUNS" | "TIMER" | "ENDED" | "ACCOUNTS" => Symbol::Map(7),
            name if name.starts_with("scx_bpf_") || name.starts_with("bpf_iter_") => Symbol::Function(1000),
            name if name.to_uppercase() == name => Symbol::Number(0x1234_5678_9abc_def0),
            _ => return None,
        })
    }

    /// Instructions of an operation, by how they refer to what.
    fn references(program: &Program, operation: u8, way: u32) -> Vec<u32> {
        let found = program.code.iter().filter_map(|instruction| match *instruction {
            [code, registers, _, _, a, b, c, d] if code == operation && u32::from(registers >> 4) == way => {
                Some(u32::from_le_bytes([a, b, c, d]))
            }
            _ => None,
        });
        found.collect()
    }

    #[test]
    fn every_reference_of_the_scheduler_is_linked() {
        let programs = link(super::super::OBJECT, any).unwrap();
        let mut names: Vec<_> = programs.iter().map(|program| program.name).collect();
        names.sort_unstable();
        let expected = [
            "cpu_release",
            "dispatch",
            "enqueue",
            "exit",
            "init",
            "running",
            "select_cpu",
            "stopping",
        ];
        assert_eq!(names, expected);
        for program in &programs {
            // What is left as it was compiled would call itself.
            assert!(references(program, CALL, 1).is_empty(), "{}", program.name);
            let functions = references(program, CALL, BPF_PSEUDO_KFUNC_CALL);
            assert!(functions.iter().all(|id| *id == 1000), "{}", program.name);
            let maps = references(program, LOAD, BPF_PSEUDO_MAP_FD);
            assert!(maps.iter().all(|map| *map == 7), "{}", program.name);
            assert_eq!(program.sleepable, program.name == "init");
        }
        let exit = programs.iter().find(|program| program.name == "exit").unwrap();
        assert!(references(exit, LOAD, 0).contains(&0x9abc_def0));
    }

    #[test]
    fn what_the_timer_calls_is_behind_what_sets_it() {
        let programs = link(super::super::OBJECT, any).unwrap();
        let with: Vec<_> = programs.iter().filter(|program| program.callback.is_some()).collect();
        let [init] = with[..] else {
            panic!("{}", with.len());
        };
        assert_eq!(init.name, "init");
        let [distance] = references(init, LOAD, BPF_PSEUDO_FUNC)[..] else {
            panic!("one reference");
        };
        let at = init
            .code
            .iter()
            .position(|instruction| instruction[..2] == [LOAD, 0x42]);
        let at = u32::try_from(at.unwrap()).unwrap();
        assert_eq!(Some(at + 1 + distance), init.callback);
    }

    #[test]
    fn what_the_kernel_lacks_is_named() {
        let without = |name: &str| any(name).filter(|_| name != "scx_bpf_kick_cpu");
        let error = link(super::super::OBJECT, without).err().unwrap().to_string();
        assert_eq!(error, "this kernel has no scx_bpf_kick_cpu");
        let error = link(b"no object file", any).err().unwrap().to_string();
        assert!(error.contains("damaged"), "{error}");
    }
}
