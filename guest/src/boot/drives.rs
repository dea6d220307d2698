//! Which drives the machine has beside that of its own root file system, by the kernel's command line.

use std::path::PathBuf;

use super::IMAGE_DRIVE;

/// Names the drive with the image that the machine was launched from.
const LAUNCHED_FROM: &str = "stoker.image";
/// Names the one that is the machine's to write to.
const SCRATCH: &str = "stoker.scratch";
/// Where that is where nothing else is said, unless the image is there: then there is none.
const SCRATCH_DRIVE: &str = "/dev/vdb";
/// What all of them are called, with a letter behind.
const VIRTIO: &str = "/dev/vd";

/// The drives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Drives {
    /// The image that the machine was launched from; none in one for functions.
    pub(crate) image: Option<PathBuf>,
    /// To write to.
    pub(crate) scratch: Option<PathBuf>,
}

/// A command line that can't be meant.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DrivesError {
    #[error("{name}={value} on the kernel's command line is no drive: /dev/vdb to /dev/vdz are")]
    NoDrive { name: &'static str, value: String },
    #[error("the kernel's command line names {0} for both the image and what is written")]
    Same(String),
    #[error("the kernel's command line has {0} twice")]
    Twice(&'static str),
}

// === impl Drives ===

impl Drives {
    /// By a command line as `/proc/cmdline` has it.
    pub(super) fn named(command_line: &str) -> Result<Self, DrivesError> {
        let image = drive(command_line, LAUNCHED_FROM)?;
        let scratch = drive(command_line, SCRATCH)?;
        if let Some(same) = image.filter(|_| image == scratch) {
            return Err(DrivesError::Same(same.to_owned()));
        }
        let scratch = scratch.or_else(|| Some(SCRATCH_DRIVE).filter(|_| image != Some(SCRATCH_DRIVE)));
        Ok(Self {
            image: image.map(PathBuf::from),
            scratch: scratch.map(PathBuf::from),
        })
    }
}

/// The drive that a parameter of this name has as its value, if there is one.
fn drive<'a>(command_line: &'a str, name: &'static str) -> Result<Option<&'a str>, DrivesError> {
    let mut values = command_line
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let value = values.next();
    if values.next().is_some() {
        return Err(DrivesError::Twice(name));
    }
    match value {
        Some(value) if !is_drive(value) => Err(DrivesError::NoDrive {
            name,
            value: value.to_owned(),
        }),
        value => Ok(value),
    }
}

/// Not the one of the machine's own root file system.
fn is_drive(path: &str) -> bool {
    let letter = path.strip_prefix(VIRTIO).map(str::as_bytes);
    path != IMAGE_DRIVE && matches!(letter, Some([b'a'..=b'z']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(command_line: &str) -> Result<[Option<String>; 2], DrivesError> {
        let Drives { image, scratch } = Drives::named(command_line)?;
        Ok([image, scratch].map(|path| path.map(|path| path.display().to_string())))
    }

    fn drives(image: Option<&str>, scratch: Option<&str>) -> Result<[Option<String>; 2], DrivesError> {
        Ok([image, scratch].map(|path| path.map(str::to_owned)))
    }

    #[test]
    fn a_machine_for_functions_has_a_drive_to_write_to() {
        for line in [
            "",
            "console=ttyS0 quiet",
            "xstoker.image=/dev/vdc stoker.imagex=/dev/vdc image=/dev/vdc\n",
        ] {
            assert_eq!(named(line), drives(None, Some("/dev/vdb")), "{line}");
        }
    }

    #[test]
    fn drives_are_as_the_command_line_says() {
        let (b, c) = (Some("/dev/vdb"), Some("/dev/vdc"));
        let line = "console=ttyS0 stoker.image=/dev/vdb quiet stoker.scratch=/dev/vdc\n";
        assert_eq!(named(line), drives(b, c));
        assert_eq!(named("stoker.image=/dev/vdc"), drives(c, b));
        assert_eq!(named("stoker.image=/dev/vdb"), drives(b, None));
        assert_eq!(named("stoker.scratch=/dev/vdz"), drives(None, Some("/dev/vdz")));
    }

    #[test]
    fn what_is_no_drive_is_refused() {
        for value in [
            "",
            "/dev/vda",
            "/dev/vd",
            "/dev/vdbb",
            "/dev/vdB",
            "/dev/sda",
            "/dev/vd/",
            "../dev/vdb",
            "/etc",
        ] {
            for name in [LAUNCHED_FROM, SCRATCH] {
                let refused = named(&format!("{name}={value}"));
                let value = value.to_owned();
                assert_eq!(refused, Err(DrivesError::NoDrive { name, value }));
            }
        }
        let same = "stoker.image=/dev/vdc stoker.scratch=/dev/vdc";
        assert_eq!(named(same), Err(DrivesError::Same("/dev/vdc".to_owned())));
        let twice = "stoker.image=/dev/vdc stoker.image=/dev/vdd";
        assert_eq!(named(twice), Err(DrivesError::Twice(LAUNCHED_FROM)));
    }
}
