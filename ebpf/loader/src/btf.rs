//! Where the kernel's structures have their fields, from its type information (BTF, `Documentation/bpf/btf.rst` of the kernel).
//!
//! Only what is asked for is looked at: the types are read once from the first to the last, and none is kept.

const MAGIC: u16 = 0xeb9f;

/// Kinds of types, as `include/uapi/linux/btf.h` numbers them, by what follows each.
const INT: u32 = 1;
const ARRAY: u32 = 3;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
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
        let mut rest = self.types;
        while !rest.is_empty() {
            let info = word(rest, 4)?;
            let (kind, count) = (info >> 24 & 0x1f, usize::try_from(info & 0xffff).ok()?);
            let follows = match kind {
                INT | VAR | DECL_TAG => 4,
                ARRAY => 12,
                STRUCT | UNION | DATASEC | ENUM64 => count * MEMBER,
                ENUM | FUNC_PROTO => count * 8,
                _ => 0,
            };
            let members = rest.get(TYPE..TYPE + follows)?;
            if kind == STRUCT
                && self.is_named(word(rest, 0)?, structure)
                && let Some(found) = members
                    .chunks_exact(MEMBER)
                    .find(|found| word(found, 0).is_some_and(|name| self.is_named(name, member)))
            {
                // Where the structure has bit fields the upper 8 bits are the size of one.
                let bits = word(found, 8)?;
                let (size, bits) = if info >> 31 != 0 {
                    (bits >> 24, bits & 0xff_ffff)
                } else {
                    (0, bits)
                };
                return (size == 0 && bits % 8 == 0).then_some(bits / 8);
            }
            rest = rest.get(TYPE + follows..)?;
        }
        None
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
        let length = u32::try_from(types.len() * 4).unwrap();
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, length, length, u32::try_from(strings.len()).unwrap()]
            .into_iter()
            .chain(types)
        {
            bytes.extend(word.to_le_bytes());
        }
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
    fn what_is_none_is_refused() {
        assert!(Btf::parse(b"").is_none());
        assert!(Btf::parse(b"\x7fELF and more than that").is_none());
        let bytes = sample();
        assert!(Btf::parse(&bytes[..bytes.len() - 1]).is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..140, byte: u8) {
            let look = |bytes: &[u8]| Btf::parse(bytes).map(|btf| btf.offset("a", "y"));
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
