use super::*;

/// A host on which nothing is to be done.
fn fit() -> Facts {
    let folder = |key, path: &str| Folder {
        key,
        path: path.into(),
        state: FolderState::There { owner: 0, mode: 0o700 },
        free: Some(100 << 30),
    };
    Facts {
        user: 0,
        kernel: "6.12.95+deb12-amd64".into(),
        cpu_flags: vec!["vmx".into()],
        kvm: Kvm::Runs,
        ebpf: Ebpf::Loads,
        sched_ext: SchedExt::Absent,
        cgroup_mount: Some("/sys/fs/cgroup".into()),
        cgroup_controllers: ["cpu", "io", "memory", "pids"].map(str::to_owned).into(),
        cgroup_writable: true,
        open_files: Some(1 << 20),
        threads: Some(100_000),
        memory: Some(16 << 30),
        swap: Vec::new(),
        page_merging: false,
        smt: Some(false),
        flaws: [
            (
                "mds".to_owned(),
                "Mitigation: Clear CPU buffers; SMT vulnerable".to_owned(),
            ),
            ("l1tf".to_owned(), "Not affected".to_owned()),
        ]
        .into(),
        huge_pages: Some("madvise".into()),
        folders: vec![
            folder("store.path", "/var/lib/stoker/state"),
            folder("machines.run_dir", "/run/stoker"),
            folder(SCRATCH_DIR, "/var/lib/stoker/scratch"),
        ],
        boot_files: Ok(()),
        clock_synchronised: Some(true),
        agent: Agent::Stopped,
        database: Some(Ok(())),
    }
}

/// The findings that are not ok, as `check verdict: detail (remedy)`.
fn found(change: impl FnOnce(&mut Facts)) -> Vec<String> {
    let mut facts = fit();
    change(&mut facts);
    let findings = judge(&facts, &Config::default()).into_iter();
    findings
        .filter(|finding| finding.verdict != Verdict::Ok)
        .map(|finding| {
            let remedy = finding.remedy.expect("says what to do");
            format!("{} {:?}: {} ({remedy})", finding.check, finding.verdict, finding.detail)
        })
        .collect()
}

#[test]
fn a_fit_host_needs_nothing() {
    assert!(found(|_| {}).is_empty());
    let findings = judge(&fit(), &Config::default());
    assert!(findings.iter().all(|finding| finding.remedy.is_none()));
}

#[test]
fn what_is_configured_for_scratch_disks_has_to_be_free() {
    let mut config = Config::default();
    config.pool.scratch_gib = Some(99);
    assert_eq!(scratch(&fit(), &config).verdict, Verdict::Ok);
    config.pool.scratch_gib = Some(101);
    let finding = scratch(&fit(), &config);
    assert_eq!(finding.verdict, Verdict::Warn);
    assert!(
        finding.detail.contains("103424 MiB, and 102400 MiB are free"),
        "{}",
        finding.detail
    );
}

#[test]
fn the_scheduler_in_force_is_told() {
    let of = |wanted, sched_ext: SchedExt, agent| {
        let mut config = Config::default();
        config.machines.scheduler = wanted;
        let facts = Facts {
            sched_ext,
            agent,
            ..fit()
        };
        let finding = scheduler(&facts, &config);
        (finding.verdict, finding.detail)
    };
    let ours = SchedExt::Runs("stoker".into());
    let other = SchedExt::Runs("scx_other".into());
    for (wanted, sched_ext, agent, verdict, says) in [
        (
            Scheduler::Auto,
            SchedExt::Absent,
            Agent::Runs,
            Verdict::Ok,
            "no sched_ext",
        ),
        (
            Scheduler::SchedExt,
            SchedExt::Absent,
            Agent::Stopped,
            Verdict::Fail,
            "has none",
        ),
        (Scheduler::Auto, SchedExt::Idle, Agent::Stopped, Verdict::Ok, "will use"),
        (
            Scheduler::Auto,
            SchedExt::Idle,
            Agent::Runs,
            Verdict::Warn,
            "does not use",
        ),
        (
            Scheduler::RealTime,
            SchedExt::Idle,
            Agent::Runs,
            Verdict::Ok,
            "as configured",
        ),
        (Scheduler::Auto, ours, Agent::Runs, Verdict::Ok, "in force"),
        (Scheduler::Auto, other.clone(), Agent::Runs, Verdict::Warn, "scx_other"),
        (Scheduler::RealTime, other, Agent::Runs, Verdict::Ok, "as configured"),
    ] {
        let (found, detail) = of(wanted, sched_ext, agent);
        assert_eq!(found, verdict, "{detail}");
        assert!(detail.contains(says), "{detail}");
    }
}

#[test]
fn each_fault_is_found_once_with_what_to_do() {
    type Change = fn(&mut Facts);
    for (begins, says, change) in [
        (
            "kernel Fail",
            "older than 6.1",
            (|facts| facts.kernel = "5.10.0-28".into()) as Change,
        ),
        ("kernel Fail", "older than 6.1", |facts| facts.kernel = "6.0.19".into()),
        ("kvm Fail", "modprobe kvm_intel", |facts| facts.kvm = Kvm::Missing),
        ("kvm Fail", "modprobe kvm_amd", |facts| {
            facts.kvm = Kvm::Missing;
            facts.cpu_flags = vec!["hypervisor".into(), "svm".into()];
        }),
        ("kvm Fail", "nested virtualisation", |facts| {
            facts.kvm = Kvm::Missing;
            facts.cpu_flags = vec!["hypervisor".into()];
        }),
        ("kvm Fail", "in the firmware", |facts| {
            facts.kvm = Kvm::Missing;
            facts.cpu_flags.clear();
        }),
        ("kvm Fail", "join the group", |facts| facts.kvm = Kvm::Denied),
        ("kvm Fail", "400 ns", |facts| {
            facts.kvm = Kvm::Unfit("400 ns an instruction".into())
        }),
        ("cgroup Fail", "mount -t cgroup2", |facts| facts.cgroup_mount = None),
        (
            "cgroup Fail",
            "/sys/fs/cgroup/stoker lacks the controllers memory, pids",
            |facts| {
                facts.cgroup_controllers = vec!["cpu".into()];
            },
        ),
        ("cgroup Fail", "read-only", |facts| facts.cgroup_writable = false),
        ("ebpf Fail", "CAP_BPF", |facts| {
            facts.ebpf = Ebpf::Refused("locked down".into())
        }),
        (
            "scratch-disk Fail",
            "disk for 1 machines of 1024 MiB, and 2 are to be warm",
            |facts| facts.folders[2].free = Some(3 << 30),
        ),
        (
            "scratch-disk Warn",
            "disk for 5 machines of 1024 MiB, and memory for 28",
            |facts| facts.folders[2].free = Some(10 << 30),
        ),
        ("open-files Warn", "LimitNOFILE=2048", |facts| {
            facts.open_files = Some(1024)
        }),
        ("threads Warn", "kernel.threads-max=", |facts| {
            facts.threads = Some(1000)
        }),
        ("swap Warn", "/dev/sda2", |facts| facts.swap = vec!["/dev/sda2".into()]),
        ("ksm Warn", "/sys/kernel/mm/ksm/run", |facts| facts.page_merging = true),
        ("smt Warn", "nosmt", |facts| facts.smt = Some(true)),
        ("cpu-flaws Warn", "mds (Vulnerable: no microcode)", |facts| {
            facts.flaws.insert("mds".into(), "Vulnerable: no microcode".into());
        }),
        ("clock Warn", "chrony", |facts| facts.clock_synchronised = Some(false)),
        ("store.path Fail", "chmod go-w /var/lib/stoker/state", |facts| {
            facts.folders[0].state = FolderState::There { owner: 0, mode: 0o770 };
        }),
        ("store.path Fail", "the user 7", |facts| {
            facts.folders[0].state = FolderState::There { owner: 7, mode: 0o700 };
        }),
        ("store.path Fail", "is no folder", |facts| {
            facts.folders[0].state = FolderState::NotAFolder
        }),
        ("store.path Fail", "full", |facts| facts.folders[0].free = Some(1000)),
        ("store.path Warn", "only 512 MiB", |facts| {
            facts.folders[0].free = Some(512 << 20)
        }),
        ("machines.run_dir Fail", "full", |facts| facts.folders[1].free = Some(0)),
        ("boot-files Fail", "machines.kernel", |facts| {
            facts.boot_files = Err("machines.kernel: is empty".into())
        }),
        ("database Fail", "stoker admin restore", |facts| {
            facts.database = Some(Err("is damaged".into()))
        }),
        ("agent Warn", "the socket's group", |facts| {
            facts.agent = Agent::Unknown("denied".into())
        }),
    ] {
        let found = found(change);
        assert_eq!(found.len(), 1, "{begins}: {found:?}");
        assert!(
            found[0].starts_with(begins) && found[0].contains(says),
            "{says}: {found:?}"
        );
    }
}

#[test]
fn without_root_what_is_not_known_is_no_failure() {
    let found = found(|facts| {
        facts.user = 1000;
        facts.ebpf = Ebpf::NotRoot;
        facts.cgroup_writable = false;
        for folder in &mut facts.folders {
            folder.state = FolderState::Missing;
        }
    });
    assert!(found.iter().all(|line| line.contains("Warn")), "{found:?}");
    assert_eq!(found.len(), 2);
}

#[test]
fn an_agent_that_runs_is_left_alone() {
    let found = found(|facts| {
        facts.agent = Agent::Runs;
        facts.ebpf = Ebpf::InUse;
        facts.database = None;
    });
    assert!(found.is_empty(), "{found:?}");
}
