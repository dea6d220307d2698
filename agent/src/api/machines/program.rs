//! What is run in a machine: the image's configuration and the request together, by Docker's rules.

use std::collections::HashMap;

use stoker_images::Config;
use stoker_proto::limits::{PROGRAM_BYTES, program_bytes};
use stoker_proto::v1;
use ulid::ULID_LEN;

use crate::api::errors::Violations;
use crate::machines::Program;

/// The most words of a command.
const WORDS: usize = 1024;

/// The longest path, in bytes (PATH_MAX, limits.h).
const PATH: usize = 4096;

/// The longest name of a user and a group, in bytes.
const USER: usize = 256;

/// The most groups that a program can be in beside its own (NGROUPS_MAX, limits.h).
const GROUPS: usize = 65536;

/// What of a request is in place of the image's, or beside it.
#[derive(Debug, Default)]
pub(super) struct Given {
    pub(super) entrypoint: Vec<String>,
    pub(super) command: Vec<String>,
    pub(super) environment: HashMap<String, String>,
}

/// The program that an image runs. Its command is empty where neither names one.
pub(super) fn of(config: Config, given: Given) -> Program {
    let mut command = match given.entrypoint.is_empty() {
        true => config.entrypoint,
        false => given.entrypoint.clone(),
    };
    command.extend(match (given.entrypoint.is_empty(), given.command.is_empty()) {
        (true, true) => config.cmd,
        _ => given.command,
    });
    Program {
        command,
        environment: environment(config.env, given.environment),
        working_dir: config.working_dir,
        user: config.user,
        stop_signal: config.stop_signal,
    }
}

/// Whether a guest takes it: with what the image brings it may be more than a request alone may have.
pub(super) fn check(program: &Program, violations: &mut Violations) {
    let words = program.command.iter().chain(&program.environment);
    let others = [&program.working_dir, &program.user.home];
    // Its host's name is the machine's id.
    let bytes = program_bytes(words.chain(others).map(String::as_str)) + ULID_LEN + 1;
    match program.command.first() {
        None => violations.add("command", "is missing: the image names no program"),
        Some(program) if program.is_empty() => violations.add("command", "must begin with a program"),
        Some(_) if bytes > PROGRAM_BYTES => violations.add(
            "command",
            format!(
                "has {bytes} bytes with its environment and what the image has of both; at most {PROGRAM_BYTES} are allowed"
            ),
        ),
        Some(_) if program.command.len() > WORDS => violations.add(
            "command",
            format!(
                "has {} words with what the image has; at most {WORDS} are allowed",
                program.command.len()
            ),
        ),
        Some(_) => {}
    }
    // These only the image says.
    if program.working_dir.len() > PATH || program.user.home.len() > PATH {
        violations.add(
            "image",
            format!("has a working directory, or a home folder of its user, of more than {PATH} bytes"),
        );
    }
    if program.user.groups.len() > GROUPS {
        violations.add("image", format!("has its user in more than {GROUPS} groups"));
    }
}

/// Both, in the image's order, and what it does not have by name.
fn environment(of_image: Vec<String>, mut given: HashMap<String, String>) -> Vec<String> {
    let mut all: Vec<String> = of_image
        .into_iter()
        .map(|variable| {
            let name = variable.split_once('=').map_or(&*variable, |(name, _)| name);
            match given.remove(name) {
                Some(value) => format!("{name}={value}"),
                None => variable,
            }
        })
        .collect();
    let mut rest: Vec<String> = given
        .into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    rest.sort_unstable();
    all.append(&mut rest);
    all
}

/// Checks words of a command line, which may be none.
pub(super) fn check_words(field: &str, words: &[String], violations: &mut Violations) {
    let bytes = program_bytes(words.iter().map(String::as_str));
    if words.len() > WORDS || bytes > PROGRAM_BYTES {
        violations.add(
            field,
            format!("must be at most {WORDS} words, and {PROGRAM_BYTES} bytes of them"),
        );
    }
    if words.iter().any(|word| word.contains('\0')) {
        violations.add(field, "must not have a NUL character");
    }
}

/// Checks a command line, whose first word is a program.
pub(super) fn check_command(field: &str, words: &[String], violations: &mut Violations) {
    check_words(field, words, violations);
    match words.first() {
        None => violations.add(field, "is missing"),
        Some(program) if program.is_empty() => violations.add(field, "must begin with a program"),
        Some(_) => {}
    }
}

/// Checks variables as they stand in an environment (environ(7)).
pub(super) fn check_environment(field: &str, environment: &HashMap<String, String>, violations: &mut Violations) {
    let bytes = environment_bytes(environment);
    if bytes > PROGRAM_BYTES {
        violations.add(
            field,
            format!("has {bytes} bytes of names and values; at most {PROGRAM_BYTES} are allowed"),
        );
        return;
    }
    let mut names: Vec<_> = environment.iter().collect();
    names.sort_unstable();
    for (name, value) in names {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let shown: String = name.chars().take(80).collect();
            violations.add(
                format!("{field}[{shown:?}]"),
                "a name must not be empty or have a `=`, and neither name nor value a NUL character",
            );
        }
    }
}

fn environment_bytes(environment: &HashMap<String, String>) -> usize {
    program_bytes(
        environment
            .iter()
            .flat_map(|(name, value)| [name.as_str(), value.as_str()]),
    )
}

/// Checks that all that a program beside that of the image is given is no more than a guest takes.
pub(super) fn check_whole(start: &v1::ExecStart, violations: &mut Violations) {
    let others = [&start.working_dir, &start.user];
    let bytes = program_bytes(start.command.iter().chain(others).map(String::as_str));
    let bytes = bytes + environment_bytes(&start.environment);
    // What is wrong with a part is told already.
    if violations.found().is_empty() && bytes > PROGRAM_BYTES {
        violations.add(
            "start",
            format!("has {bytes} bytes of command and environment; at most {PROGRAM_BYTES} are allowed"),
        );
    }
}

/// Checks a folder; empty is as the image has it.
pub(super) fn check_folder(field: &str, folder: &str, violations: &mut Violations) {
    let is_path = folder.is_empty() || folder.starts_with('/');
    if !is_path || folder.len() > PATH || folder.contains('\0') {
        violations.add(field, format!("must be an absolute path of at most {PATH} bytes"));
    }
}

/// Checks `USER[:GROUP]`; empty is as the image has it.
pub(super) fn check_user(field: &str, user: &str, violations: &mut Violations) {
    let is_good = user.len() <= USER
        && !user.contains(|c: char| c.is_whitespace() || c.is_control())
        && user.matches(':').count() <= 1;
    if !is_good {
        violations.add(field, format!("must be USER or USER:GROUP, of at most {USER} bytes"));
    }
}

#[cfg(test)]
mod tests {
    use stoker_images::User;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn config(entrypoint: &str, cmd: &str, env: &[&str]) -> Config {
        Config {
            entrypoint: words(entrypoint),
            cmd: words(cmd),
            env: env.iter().map(|variable| (*variable).to_owned()).collect(),
            user: User {
                uid: 7,
                gid: 8,
                groups: vec![9],
                home: "/home".into(),
            },
            working_dir: "/srv".into(),
            exposed_ports: Vec::new(),
            stop_signal: 3,
        }
    }

    #[test]
    fn commands_are_put_together_as_docker_does() {
        for (image, given, runs) in [
            (("/entry", "-a"), ("", ""), "/entry -a"),
            (("/entry", "-a"), ("", "-b c"), "/entry -b c"),
            (("/entry", "-a"), ("sh", ""), "sh"),
            (("/entry", "-a"), ("sh", "-c x"), "sh -c x"),
            (("", "serve"), ("", ""), "serve"),
            (("", "serve"), ("", "other"), "other"),
            (("", ""), ("", ""), ""),
        ] {
            let given = Given {
                entrypoint: words(given.0),
                command: words(given.1),
                ..Default::default()
            };
            assert_eq!(
                of(config(image.0, image.1, &[]), given).command,
                words(runs),
                "{image:?}"
            );
        }
    }

    #[test]
    fn what_is_given_goes_before_what_the_image_has() {
        let given = Given {
            environment: [("B", "2"), ("PATH", "/x"), ("A", "a=1")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        };
        let program = of(config("sh", "", &["PATH=/bin", "LANG=C"]), given);
        assert_eq!(program.environment, ["PATH=/x", "LANG=C", "A=a=1", "B=2"]);
        assert_eq!((&*program.working_dir, program.stop_signal), ("/srv", 3));
        assert_eq!(program.user.uid, 7);
    }

    #[test]
    fn a_program_is_what_a_guest_takes() {
        let wrong = |cmd: &str, variable: &str| {
            let mut violations = Violations::default();
            check(&of(config("", cmd, &[variable]), Given::default()), &mut violations);
            violations.found().len()
        };
        assert_eq!(wrong("serve", "A=b"), 0);
        assert_eq!(wrong("", "A=b"), 1);
        assert_eq!(wrong(&"x ".repeat(WORDS), "A=b"), 0);
        assert_eq!(wrong(&"x ".repeat(WORDS + 1), "A=b"), 1);
        // What an image says of its user and folder.
        let good = config("serve", "", &[]);
        let fields = |config: Config| {
            let mut violations = Violations::default();
            check(&of(config, Given::default()), &mut violations);
            let found = violations.found().iter();
            found.map(|(field, _)| field.clone()).collect::<Vec<_>>()
        };
        let long = format!("/{}", "x".repeat(PATH));
        let user = |home: &str, groups: Vec<u32>| Config {
            user: User {
                home: home.to_owned(),
                groups,
                ..good.user.clone()
            },
            ..good.clone()
        };
        let folder = Config {
            working_dir: long.clone(),
            ..good.clone()
        };
        for config in [folder, user(&long, Vec::new()), user("/", vec![1; GROUPS + 1])] {
            assert_eq!(fields(config), ["image"]);
        }
        assert!(fields(user("/", vec![1; GROUPS])).is_empty());
        // As a guest counts it: with the zero bytes, its folder, its home and its host's name.
        let rest = program_bytes(["serve", "A=", "/srv", "/home", "0".repeat(ULID_LEN).as_str()]);
        let most = |more: usize| format!("A={}", "b".repeat(PROGRAM_BYTES - rest + more));
        assert_eq!((wrong("serve", &most(0)), wrong("serve", &most(1))), (0, 1));
    }

    #[test]
    fn what_no_program_can_be_given_is_refused() {
        let mut violations = Violations::default();
        check_command("command", &[], &mut violations);
        check_command("command", &["".to_owned()], &mut violations);
        check_words("words", &["a\0".to_owned()], &mut violations);
        check_words("words", &vec!["a".to_owned(); WORDS + 1], &mut violations);
        check_words("words", &["a".repeat(PROGRAM_BYTES)], &mut violations);
        let environment = |name: &str, value: &str| HashMap::from([(name.to_owned(), value.to_owned())]);
        check_environment("e", &environment("", "x"), &mut violations);
        check_environment("e", &environment("a=b", "x"), &mut violations);
        check_environment("e", &environment("a", "\0"), &mut violations);
        check_environment("e", &environment("a", &"x".repeat(PROGRAM_BYTES)), &mut violations);
        check_folder("f", "relative", &mut violations);
        check_folder("f", &format!("/{}", "x".repeat(PATH)), &mut violations);
        check_user("u", "a:b:c", &mut violations);
        check_user("u", "a b", &mut violations);
        let fields: Vec<_> = violations.found().iter().map(|(field, _)| &**field).collect();
        assert_eq!(
            fields,
            [
                "command",
                "command",
                "words",
                "words",
                "words",
                "e[\"\"]",
                "e[\"a=b\"]",
                "e[\"a\"]",
                "e",
                "f",
                "f",
                "u",
                "u"
            ]
        );
        let mut violations = Violations::default();
        check_command("command", &words("sh -c x"), &mut violations);
        check_environment("e", &environment("a.b-c", "x=y"), &mut violations);
        check_folder("f", "", &mut violations);
        check_folder("f", "/srv", &mut violations);
        check_user("u", "www-data:0", &mut violations);
        assert!(violations.found().is_empty(), "{violations:?}");
    }
}
