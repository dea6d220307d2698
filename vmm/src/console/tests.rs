use std::fs;

use super::*;

struct Bench {
    _folder: tempfile::TempDir,
    path: std::path::PathBuf,
    console: Console,
    start: Instant,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console.log");
    let console = Console::file(&path).unwrap();
    let start = console.inner().budget.at;
    Bench {
        _folder: folder,
        path,
        console,
        start,
    }
}

impl Bench {
    /// The guest writes something so long after its start.
    fn write(&self, bytes: &[u8], after: Duration) {
        self.console.inner().write(bytes, || self.start + after);
    }

    fn flush(&self, after: Duration) {
        self.console.inner().flush(self.start + after);
    }

    fn file(&self) -> String {
        fs::read_to_string(&self.path).unwrap()
    }
}

fn line(number: usize) -> String {
    format!("{number:06}{}\n", "x".repeat(99))
}

#[test]
fn a_guest_that_writes_without_end_fills_no_disk() {
    let bench = bench();
    bench.write(b"the first line\n", Duration::ZERO);
    // 60 KiB a second: no more than may be written.
    for number in 0..30_000 {
        bench.write(line(number).as_bytes(), Duration::from_millis(2) * number as u32);
        if number % 1000 == 0 {
            assert!(bench.path.metadata().unwrap().len() <= FILE_BYTES);
        }
    }
    let tail = bench.console.finish();
    let text = bench.file();
    assert!(text.len() as u64 <= FILE_BYTES);
    assert!(text.starts_with("the first line\n"));
    assert!(text.contains("older output was dropped") && !text.contains("bytes were dropped"));
    assert!(text.lines().last().unwrap().starts_with("029999"));
    assert!(tail.len() <= TAIL_BYTES && tail.lines().last().unwrap().starts_with("029999"));
    assert_eq!(tail.lines().next().unwrap().len(), 105);
}

#[test]
fn a_flood_is_not_written_but_for_its_end() {
    let bench = bench();
    let flood: String = (0..30_000).map(line).collect();
    for byte in flood.as_bytes() {
        bench.write(&[*byte], Duration::ZERO);
    }
    let before = bench.path.metadata().unwrap().len();
    assert!(before <= BURST && before > BURST - 2 * GATHERED_BYTES as u64);
    bench.write(b"the last words", Duration::ZERO);
    bench.console.finish();
    let text = bench.file();
    assert!(text.contains("bytes were dropped here"), "it says so");
    assert!(text.ends_with(&format!("{}the last words", line(29_999))));

    // A second later some more may be written, and it is told what was not.
    let bench = self::bench();
    bench.write(flood.as_bytes(), Duration::ZERO);
    bench.write(b"later", Duration::from_secs(1));
    bench.flush(Duration::from_secs(1));
    let text = bench.file();
    assert!(text.contains("a second ...]\n") && text.ends_with("x\nlater"));
}

#[test]
fn bytes_are_gathered_before_they_are_written() {
    let bench = bench();
    for byte in b"one line\n" {
        bench.write(&[*byte], Duration::ZERO);
    }
    assert_eq!(bench.file(), "");
    assert_eq!(bench.console.tail(), "one line\n");
    bench.flush(Duration::ZERO);
    assert_eq!(bench.file(), "one line\n");
    bench.write(&[b'x'; GATHERED_BYTES], Duration::ZERO);
    assert_eq!(bench.file().len(), 9 + GATHERED_BYTES);
}

#[test]
fn the_timer_says_when_they_are_written() {
    let bench = bench();
    let epoll = Epoll::new().unwrap();
    bench.console.watch(&epoll, 7).unwrap();
    let mut events = [EpollEvent::default(); 2];
    assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);
    let mut console = bench.console.clone();
    for text in ["one", "two"] {
        for byte in text.bytes() {
            console.write_all(&[byte]).unwrap();
        }
        assert_eq!(epoll.wait(10_000, &mut events).unwrap(), 1);
        assert_eq!(events[0].data(), 7);
        bench.console.write_gathered();
        assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);
    }
    assert_eq!(bench.file(), "onetwo");
}

#[test]
fn the_tail_holds_all_of_a_short_output() {
    let mut console = Console::nowhere();
    console.write_all(b"one\ntwo \xff").unwrap();
    assert_eq!(console.tail(), "one\ntwo \u{fffd}");
    console.write_all(&[b'x'; 3 * TAIL_BYTES]).unwrap();
    assert_eq!(console.finish().len(), TAIL_BYTES);
}

#[test]
fn a_thread_that_panicked_while_it_wrote_is_not_waited_for() {
    let console = Console::nowhere();
    let held = console.inner();
    assert_eq!(console.try_finish(), None);
    drop(held);
    assert_eq!(console.try_finish().as_deref(), Some(""));
}
