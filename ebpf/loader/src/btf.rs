//! What the kernel tells of its types (BTF, `Documentation/bpf/btf.rst` of the kernel): above all where its structures have their
//! fields.
//!
//! Only what is asked for is looked at: the types are read once from the first to the last, and none is kept.

use std::collections::HashMap;

const MAGIC: u16 = 0xeb9f;

/// Kinds of types, as `include/uapi/linux/btf.h` numbers them, by what follows each.
const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const VAR: u32 = 14;
const DATASEC: u32 = 15;
const DECL_TAG: u32 = 17;
const ENUM64: u32 = 19;

/// The bytes of a type's own head, and of one member of a structure.
const TYPE: usize = 12;
const MEMBER: usize = 12;

/// Type information of little-endian machines.
pub(crate) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

/// What [`Btf::names`] finds.
#[derive(Default)]
pub(crate) struct Names<'a> {
    /// Types of functions.
    pub(crate) functions: HashMap<&'a str, u32>,
    /// Values of enumerations.
    pub(crate) numbers: HashMap<&'a str, u64>,
}

/// One of the types.
#[derive(Clone, Copy)]
pub(crate) struct Type<'a> {
    /// Its number, from 1.
    pub(crate) id: u32,
    name: u32,
    info: u32,
    /// Its size in bytes, where it has one.
    pub(crate) size: u32,
    members: &'a [u8],
}

// === impl Btf ===

impl<'a> Btf<'a> {
    /// What a file like `/sys/kernel/btf/vmlinux` holds; `None` where that is something else.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let magic = u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?);
        if magic != MAGIC {
            return None;
        }
        let header = usize::try_from(word(bytes, 4)?).ok()?;
        let body = bytes.get(header..)?;
        let section = |at: usize| {
            let offset = usize::try_from(word(bytes, at)?).ok()?;
            let length = usize::try_from(word(bytes, at + 4)?).ok()?;
            body.get(offset..offset.checked_add(length)?)
        };
        Some(Self {
            types: section(8)?,
            strings: section(16)?,
        })
    }

    /// How many bytes from the start of a structure a member of it lies, where it is no bit field.
    pub(crate) fn offset(&self, structure: &str, member: &str) -> Option<u32> {
        let mut structures = self.structures(structure);
        structures.find_map(|found| self.member(&found, member))?.1
    }

    /// The structures of a name, of which a kernel may have more than one.
    pub(crate) fn structures(&self, name: &str) -> impl Iterator<Item = Type<'a>> {
        self.types()
            .filter(move |found| found.kind() == STRUCT && self.is_named(found.name, name))
    }

    /// The number of a member of a structure, and how many bytes from its start it lies, where it is no bit field.
    pub(crate) fn member(&self, structure: &Type<'a>, name: &str) -> Option<(u32, Option<u32>)> {
        let members = structure.members.chunks_exact(MEMBER);
        let (number, found) = (0..)
            .zip(members)
            .find(|(_, found)| word(found, 0).is_some_and(|at| self.is_named(at, name)))?;
        // Where the structure has bit fields the upper 8 bits are the size of one.
        let bits = word(found, 8)?;
        let (size, bits) = if structure.info >> 31 != 0 {
            (bits >> 24, bits & 0xff_ffff)
        } else {
            (0, bits)
        };
        Some((number, (size == 0 && bits % 8 == 0).then_some(bits / 8)))
    }

    /// The functions and the values of enumerations whose names the caller wants.
    pub(crate) fn names(&self, is_wanted: impl Fn(&str) -> bool) -> Names<'a> {
        let mut names = Names::default();
        for found in self.types() {
            match found.kind() {
                FUNC => {
                    if let Some(name) = self.name(found.name).filter(|name| is_wanted(name)) {
                        names.functions.entry(name).or_insert(found.id);
                    }
                }
                kind @ (ENUM | ENUM64) => {
                    let of = if kind == ENUM { 8 } else { MEMBER };
                    for value in found.members.chunks_exact(of) {
                        let name = word(value, 0).and_then(|at| self.name(at));
                        let (Some(name), Some(low)) = (name.filter(|name| is_wanted(name)), word(value, 4)) else {
                            continue;
                        };
                        let high = word(value, 8).unwrap_or(0);
                        names.numbers.insert(name, u64::from(high) << 32 | u64::from(low));
                    }
                }
                _ => {}
            }
        }
        names
    }

    /// All of them up to the first that is not understood.
    fn types(&self) -> impl Iterator<Item = Type<'a>> {
        let mut rest = self.types;
        (1..).map_while(move |id| {
            let info = word(rest, 4)?;
            let count = usize::try_from(info & 0xffff).ok()?;
            let follows = match info >> 24 & 0x1f {
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | DATASEC | ENUM64 => count * MEMBER,
                ENUM | FUNC_PROTO => count * 8,
                _ => 0,
            };
            let found = Type {
                id,
                name: word(rest, 0)?,
                info,
                size: word(rest, 8)?,
                members: rest.get(TYPE..TYPE + follows)?,
            };
            rest = rest.get(TYPE + follows..)?;
            Some(found)
        })
    }

    fn name(&self, offset: u32) -> Option<&'a str> {
        let string = self.strings.get(usize::try_from(offset).ok()?..)?;
        let name = string.split(|byte| *byte == 0).next()?;
        std::str::from_utf8(name).ok()
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        let string = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.strings.get(offset..));
        string
            .and_then(|string| string.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }
}

// === impl Type ===

impl Type<'_> {
    fn kind(&self) -> u32 {
        self.info >> 24 & 0x1f
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `int`, `struct b { int x; int y : 3; int z; }` and `struct a { int x; struct b y; }`, as compilers write them.
    fn sample() -> Vec<u8> {
        let strings = b"\0int\0a\0b\0x\0y\0z\0";
        let name = |name: &[u8]| {
            let at = strings
                .windows(name.len() + 1)
                .position(|at| at[..name.len()] == *name && at[name.len()] == 0);
            u32::try_from(at.unwrap()).unwrap()
        };
        let with_bit_fields = 1_u32 << 31;
        let types: Vec<u32> = [
            vec![name(b"int"), INT << 24, 4, 32],
            vec![name(b"b"), with_bit_fields | STRUCT << 24 | 3, 12],
            vec![name(b"x"), 1, 0, name(b"y"), 1, 3 << 24 | 32, name(b"z"), 1, 64],
            vec![name(b"a"), STRUCT << 24 | 2, 16],
            vec![name(b"x"), 1, 0, name(b"y"), 2, 32],
        ]
        .concat();
        bytes(&types, strings)
    }

    fn bytes(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let length = u32::try_from(types.len() * 4).unwrap();
        let header = [24, 0, length, length, u32::try_from(strings.len()).unwrap()];
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        bytes.extend(header.iter().chain(types).copied().flat_map(u32::to_le_bytes));
        bytes.extend(strings);
        bytes
    }

    #[test]
    fn finds_members_by_the_names_of_both() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.offset("a", "y"), Some(4));
        assert_eq!(btf.offset("b", "z"), Some(8));
        assert_eq!(btf.offset("b", "y"), None, "a bit field");
        assert_eq!(btf.offset("a", "z"), None);
        assert_eq!(btf.offset("c", "x"), None);
        assert_eq!(btf.offset("", "x"), None);
    }

    #[test]
    fn finds_functions_and_values_by_their_names() {
        let strings = b"\0low\0high\0call\0";
        let types = [
            vec![0, ENUM << 24 | 1, 4, 1, 7],
            vec![0, ENUM64 << 24 | 1, 8, 5, 1, 2],
            vec![10, FUNC << 24, 0],
        ];
        let bytes = bytes(&types.concat(), strings);
        let btf = Btf::parse(&bytes).unwrap();
        let names = btf.names(|_| true);
        assert_eq!(names.functions, HashMap::from([("call", 3)]));
        assert_eq!(names.numbers, HashMap::from([("low", 7), ("high", 2 << 32 | 1)]));
        assert!(btf.names(|name| name == "none").numbers.is_empty());
    }

    #[test]
    fn what_is_none_is_refused() {
        assert!(Btf::parse(b"").is_none());
        assert!(Btf::parse(b"\x7fELF and more than that").is_none());
        let bytes = sample();
        assert!(Btf::parse(&bytes[..bytes.len() - 1]).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..140, byte: u8) {
            let look = |bytes: &[u8]| {
                Btf::parse(bytes).map(|btf| (btf.offset("a", "y"), btf.names(|_| true).numbers.len()))
            };
            look(&bytes);
            bytes.splice(..bytes.len().min(2), [0x9f, 0xeb]);
            look(&bytes);
            let mut sample = sample();
            if let Some(place) = sample.get_mut(at) {
                *place = byte;
            }
            look(&sample);
        }
    }
}
