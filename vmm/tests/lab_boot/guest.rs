//! PID 1 of the guests: does what `task=` on the kernel's command line says, and tells the console.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use stoker_testkit::guest::{self, Uevents};

const HOST_CID: u32 = 2;
pub(crate) const HOST_PORT: u32 = 1024;
pub(crate) const GUEST_PORT: u32 = 52;
/// Threads that keep busy whatever CPUs there are.
const BUSY_THREADS: usize = 3;
/// What the guest writes to the start of its scratch drive, and to its end.
pub(crate) const SCRATCH_WRITTEN: usize = 4 << 20;
/// MiB that are plugged, block by block, and how much of them the guest then uses.
pub(crate) const MEMORY_PLUGGED: u64 = 256;
pub(crate) const MEMORY_USED: u64 = 160;
/// MiB that are in use at a time while memory comes and goes.
const CHURNED: usize = 64;
/// What a stream sends before it ends its half.
pub(crate) const STREAM_BYTES: usize = 3 << 20;

/// Runs the guest and never returns.
pub(crate) fn run() -> ! {
    if let Err(error) = guest::begin() {
        println!("guest: FAILED: {error:#}");
    }
    let task = guest::option("task").unwrap_or_else(|_| "off".to_owned());
    let cpus = fs::read_to_string("/sys/devices/system/cpu/online").unwrap();
    let clock = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource").unwrap();
    println!("guest: cpus {} clock {} task {task}", cpus.trim(), clock.trim());
    let result = std::panic::catch_unwind(|| match task.as_str() {
        "off" => {}
        "reset" => reboot(libc::RB_AUTOBOOT),
        "panic" => std::process::exit(0),
        "tick" => tick(),
        "spin" => spin(),
        "devices" => devices(),
        "scratch" => scratch(),
        "cpus" => run_on_cpus(),
        "busy" => {
            (0..BUSY_THREADS).for_each(|_| drop(std::thread::spawn(work)));
            std::thread::spawn(churn);
            run_on_cpus();
        }
        "memory" => memory(),
        other => panic!("no task {other}"),
    });
    if result.is_err() {
        println!("guest: FAILED");
    }
    println!("guest: off");
    reboot(libc::RB_POWER_OFF);
    unreachable!("the machine is off")
}

fn reboot(how: libc::c_int) {
    // SAFETY: touches no memory of ours.
    unsafe { libc::reboot(how) };
}

/// Says something every 20 ms.
fn tick() {
    for number in 0u64.. {
        println!("tick {number}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Keeps every CPU busy in user space.
fn spin() {
    let cpus = std::thread::available_parallelism().unwrap().get();
    for _ in 1..cpus {
        std::thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    println!("spinning");
    loop {
        std::hint::spin_loop();
    }
}

/// Computes, and now and then makes a thread and waits for it, so that the scheduler has something to do.
fn work() {
    loop {
        for number in 0..1_000_000u64 {
            std::hint::black_box(number);
        }
        std::thread::spawn(|| {}).join().unwrap();
    }
}

/// Where the kernel has its CPUs.
const CPUS: &str = "/sys/devices/system/cpu";
/// When a CPU that could not be started is tried again: the kernel had no memory for it, or the host no time.
const AGAIN: Duration = Duration::from_secs(1);

/// Runs on each CPU that comes, and says which there are whenever one comes or goes.
fn run_on_cpus() {
    let events = Uevents::listen().unwrap();
    start_cpus();
    println!(
        "cpus possible {}, {} KiB of memory free",
        fs::read_to_string(format!("{CPUS}/possible")).unwrap().trim(),
        guest::meminfo_kib("MemFree").unwrap()
    );
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(AGAIN);
            if start_cpus() {
                tell_cpus();
            }
        }
    });
    loop {
        let (action, path) = events.wait().unwrap();
        let Some(name) = path.strip_prefix("/devices/system/cpu/") else {
            continue;
        };
        if action == "add" {
            start_cpu(name);
        }
        if ["add", "remove"].contains(&&*action) {
            tell_cpus();
        }
    }
}

fn tell_cpus() {
    let online = fs::read_to_string(format!("{CPUS}/online")).unwrap();
    println!("cpus online {}.", online.trim());
}

/// Starts those that are there and off; whether there were any.
fn start_cpus() -> bool {
    let mut any = false;
    for entry in fs::read_dir(CPUS).unwrap() {
        // One that goes meanwhile is not in the way of the others.
        let Ok(name) = entry.map(|entry| entry.file_name()) else {
            continue;
        };
        let name = name.to_string_lossy();
        if fs::read_to_string(format!("{CPUS}/{name}/online")).is_ok_and(|online| online.trim() == "0") {
            start_cpu(&name);
            any = true;
        }
    }
    any
}

fn start_cpu(name: &str) {
    let file = OpenOptions::new().write(true).open(format!("{CPUS}/{name}/online"));
    if let Err(error) = file.and_then(|mut file| file.write_all(b"1")) {
        // It may have gone again.
        println!("{name} can't be started: {error}");
    }
}

fn devices() {
    block();
    println!("block is good");
    let mut random = [0; 64];
    File::open("/dev/hwrng").unwrap().read_exact(&mut random).unwrap();
    let rng = fs::read_to_string("/sys/class/misc/hw_random/rng_current").unwrap();
    assert!(rng.starts_with("virtio_rng"), "{rng}");
    assert!(random.iter().any(|byte| *byte != random[0]));
    println!("rng is good");
    vsock();
    println!("vsock is good");
}

/// The first drive is read-only and each of its sectors filled with its number; the second can be written.
fn block() {
    let serial = fs::read_to_string("/sys/block/vda/serial").unwrap();
    assert_eq!(serial.trim_end_matches('\0'), "drive0");
    assert_eq!(fs::read_to_string("/sys/block/vda/ro").unwrap().trim(), "1");
    let written = OpenOptions::new()
        .write(true)
        .open("/dev/vda")
        .and_then(|drive| drive.write_all_at(&[0; 512], 0));
    assert!(written.is_err());
    let first = fs::read("/dev/vda").unwrap();
    assert_eq!(first.len(), 1 << 20);
    for (number, sector) in first.chunks(512).enumerate() {
        assert!(sector.iter().all(|byte| *byte == number as u8), "sector {number}");
    }
    let second = OpenOptions::new().read(true).write(true).open("/dev/vdb").unwrap();
    second.write_all_at(&first, 4096).unwrap();
    second.sync_all().unwrap();
    drop_caches();
    let mut back = vec![0; first.len()];
    second.read_exact_at(&mut back, 4096).unwrap();
    assert_eq!(first, back);
    assert!(second.write_all_at(&[0; 512], 4 << 20).is_err(), "past the end");
}

/// Uses the scratch drive, the only one, before and after the host makes it larger, gives back what it wrote first, and says so.
fn scratch() {
    let serial = fs::read_to_string("/sys/block/vda/serial").unwrap();
    assert_eq!(serial.trim_end_matches('\0'), "scratch");
    assert_eq!(fs::read_to_string("/sys/block/vda/ro").unwrap().trim(), "0");
    let size = || {
        fs::read_to_string("/sys/block/vda/size")
            .unwrap()
            .trim()
            .parse::<u64>()
            .unwrap()
            * 512
    };
    let drive = OpenOptions::new().read(true).write(true).open("/dev/vda").unwrap();
    let content: Vec<u8> = (0..SCRATCH_WRITTEN).map(|at| (at % 253) as u8).collect();
    drive.write_all_at(&content, 0).unwrap();
    drive.sync_all().unwrap();
    let before = size();
    println!("scratch has {} MiB", before >> 20);
    // The kernel hears of it by an interrupt; nothing tells user space without a udev.
    while size() == before {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let now = size();
    println!("scratch has {} MiB", now >> 20);
    drive.write_all_at(&content, now - content.len() as u64).unwrap();
    drive.sync_all().unwrap();
    assert!(drive.write_all_at(&[0; 512], now).is_err(), "past the end");
    drop_caches();
    let mut back = vec![0; content.len()];
    for start in [0, now - content.len() as u64] {
        drive.read_exact_at(&mut back, start).unwrap();
        assert!(back == content, "at {start}");
    }
    const BLKDISCARD: libc::c_ulong = 0x1277;
    const BLKZEROOUT: libc::c_ulong = 0x127f;
    let quarter = content.len() as u64 / 4;
    for (call, start, length) in [(BLKDISCARD, quarter, 3 * quarter), (BLKZEROOUT, 0, quarter)] {
        let range = [start, length];
        // SAFETY: both calls read two numbers of 64 bits, which live until the call returns.
        let result = unsafe { libc::ioctl(drive.as_raw_fd(), call as _, range.as_ptr()) };
        assert_eq!(result, 0, "{call:#x}: {}", std::io::Error::last_os_error());
    }
    drive.read_exact_at(&mut back, 0).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
    println!("scratch is good");
    tick();
}

/// Says how much memory there is whenever that changes, and once all that was plugged is there, uses it and frees it again.
fn memory() {
    let total = || guest::meminfo_kib("MemTotal").unwrap() >> 10;
    let start = total();
    let mut said = 0;
    let mut used = false;
    loop {
        let now = total();
        if now != said {
            println!("memory is {now} MiB");
            said = now;
        }
        if now >= start + MEMORY_PLUGGED && !used {
            used = true;
            let content = vec![7u8; (MEMORY_USED as usize) << 20];
            println!(
                "memory is used {}.",
                content.iter().step_by(4096).filter(|byte| **byte == 7).count()
            );
            // The host has seen it when it makes the scratch drive larger than its first MiB.
            while fs::read_to_string("/sys/block/vda/size").is_ok_and(|sectors| sectors.trim() == "2048") {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            drop(content);
            println!("memory is freed");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// Takes memory and frees it, again and again: as much as fits into what there is from the start, so that all else can be taken away at
/// any time. Says so if it changes.
fn churn() {
    let mut kept = std::collections::VecDeque::new();
    for number in 0u64.. {
        kept.push_back(vec![number as u8; 1 << 20]);
        if kept.len() > CHURNED {
            let piece: Vec<u8> = kept.pop_front().unwrap();
            if piece.iter().any(|byte| *byte != piece[0]) {
                println!("guest: FAILED: memory has changed");
            }
        }
    }
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

fn vsock() {
    // To the host: it echoes, both ways at once, until each side ends its half.
    let stream = connect(HOST_PORT).unwrap();
    let mut reader = stream.try_clone().unwrap();
    let read = std::thread::spawn(move || {
        let mut back = Vec::new();
        reader.read_to_end(&mut back).unwrap();
        back
    });
    let data: Vec<u8> = (0..STREAM_BYTES).map(|at| (at % 251) as u8).collect();
    (&stream).write_all(&data).unwrap();
    end_half(&stream);
    assert!(read.join().unwrap() == data, "the echo differs");
    assert!(connect(HOST_PORT + 1).is_err(), "nobody listens there");
    println!("vsock to the host is good");

    // From the host: several at once, each echoed to its end.
    let listener = socket();
    let address = address(libc::VMADDR_CID_ANY, GUEST_PORT);
    let size = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is a valid socket address of `size` bytes.
    unsafe {
        assert_eq!(libc::bind(listener.as_raw_fd(), (&raw const address).cast(), size), 0);
        assert_eq!(libc::listen(listener.as_raw_fd(), 16), 0);
    }
    println!("listening");
    let echoes: Vec<_> = (0..super::scenarios::CLIENTS)
        .map(|_| {
            // SAFETY: the descriptor listens, and no address is asked for.
            let fd = unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
            assert!(fd >= 0);
            // SAFETY: the descriptor is new and nobody else's.
            let stream = unsafe { File::from_raw_fd(fd) };
            std::thread::spawn(move || {
                let copied = std::io::copy(&mut &stream, &mut &stream).unwrap();
                end_half(&stream);
                copied
            })
        })
        .collect();
    for echo in echoes {
        assert!(echo.join().unwrap() > 0);
    }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> File {
    // SAFETY: touches no memory of ours.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    unsafe { File::from_raw_fd(fd) }
}

fn connect(port: u32) -> std::io::Result<File> {
    let stream = socket();
    let address = address(HOST_CID, port);
    let size = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: `address` is a valid socket address of `size` bytes.
    if unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), size) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(stream)
}

fn end_half(stream: &File) {
    // SAFETY: touches no memory of ours.
    unsafe { libc::shutdown(stream.as_raw_fd(), libc::SHUT_WR) };
}
