//! Python functions as their authors know them from AWS Lambda: what is imported, and from where.

use serde_json::{Value, json};
use stoker_proto::guest::function_error::Kind;

use crate::support::{Function, Guest};
use crate::{answer, failure, log};

/// Files that have the names of modules which the runtime needs, and are none of them.
const NAMESAKES: [&str; 14] = [
    "awslambdaric/__init__.py",
    "calendar.py",
    "email.py",
    "enum/__init__.py",
    "http.py",
    "json.py",
    "logging.py",
    "runtime_client.py",
    "signal.py",
    "simplejson/__init__.py",
    "token.py",
    "traceback.py",
    "types.py",
    "warnings.py",
];

/// A function whose zip has all of them in `folder`.
fn with_namesakes(folder: &str, app: &str) -> Function {
    let names: Vec<String> = NAMESAKES.iter().map(|name| format!("{folder}{name}")).collect();
    let mut files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "OURS = True\n")).collect();
    files.push(("app.py", app));
    Function::python_files(&files)
}

#[tokio::test]
async fn a_function_may_have_files_that_are_named_as_modules_of_the_runtime() {
    let mut guest = Guest::start().await;
    let app = "import json, logging\n\ndef handler(event, context):\n    return hasattr(json, 'OURS')\n";
    let beside = with_namesakes("", app);
    let named = with_namesakes("lib/", app).with("PYTHONPATH", "/var/task/lib");
    for function in [beside, named] {
        let container = guest.container(&function).await;
        // What the runtime has imported is what the function gets, too.
        assert_eq!(answer(&guest.invoke(&container, json!(1)).await), json!(false));
        guest.stop(&container).await.unwrap();
    }
    let (_, created) = guest.create(&with_namesakes("", "raise ValueError('at init')\n")).await;
    assert_eq!(failure(&created.error), (Kind::Reported, "ValueError", "at init"));
}

#[tokio::test]
async fn modules_are_looked_for_where_lambda_looks() {
    let mut guest = Guest::start().await;
    let app = "
import os, sys, time
import house
def handler(event, context):
    return {'path': sys.path, 'PYTHONPATH': os.environ['PYTHONPATH'], 'zone': time.tzname[0], 'house': house.RULE}
";
    let files = [
        ("app.py", app),
        ("vendor.pth", "vendored\n"),
        ("vendored/house.py", "RULE = 'by vendor.pth'\n"),
        ("named/house.py", "RULE = 'by PYTHONPATH'\n"),
    ];
    let own = [
        "/usr/lib/python311.zip",
        "/usr/lib/python3.11",
        "/usr/lib/python3.11/lib-dynload",
        "/usr/local/lib/python3.11/dist-packages",
        "/usr/lib/python3/dist-packages",
    ];
    let layers = ["/opt/python/lib/python3.11/site-packages", "/opt/python"];
    let plain = Function::python_files(&files);
    // As a customer may set them, system folders left out.
    let set = plain
        .clone()
        .with("PYTHONPATH", "/var/task/named")
        .with("PATH", "/var/task/bin")
        .with("LD_LIBRARY_PATH", "/var/task/lib")
        .with("TZ", "America/New_York");
    for (function, before, python_path, zone, house) in [
        (plain, &layers[..], "/var/runtime", "UTC", "by vendor.pth"),
        (set, &[], "/var/task/named", "EST", "by PYTHONPATH"),
    ] {
        let container = guest.container(&function).await;
        let seen = answer(&guest.invoke(&container, json!({})).await);
        let named = ["/var/task/named"].iter().filter(|folder| **folder == python_path);
        let path: Vec<&str> = ["/var/task"]
            .iter()
            .chain(before)
            .chain(&["/var/runtime"])
            .chain(named)
            .chain(&own)
            .chain(&["/var/task/vendored"])
            .copied()
            .collect();
        assert_eq!(seen["path"], json!(path));
        assert_eq!(seen["PYTHONPATH"], python_path);
        assert_eq!(seen["zone"], zone);
        assert_eq!(seen["house"], house);
        guest.stop(&container).await.unwrap();
    }
}

#[tokio::test]
async fn programs_find_what_they_ask_of_a_system() {
    let mut guest = Guest::start().await;
    let app = "
import grp, locale, os, pwd, shutil, socket, ssl, subprocess
import boto3, dbm.gnu, distutils.util, ensurepip, lib2to3

def handler(event, context):
    for name in 'stdout', 'stderr':
        with open('/dev/' + name, 'w') as file:
            file.write('by /dev/' + name + '\\n')
    child = 'import boto3; print(boto3.__version__)'
    return {
        'localhost': socket.gethostbyname('localhost'),
        'host': socket.gethostbyname(socket.gethostname()),
        'user': pwd.getpwuid(os.getuid()).pw_name,
        'group': grp.getgrgid(os.getgid()).gr_name,
        'service': socket.getservbyname('https', 'tcp'),
        'protocol': socket.getprotobyname('tcp'),
        'locale': locale.setlocale(locale.LC_ALL, ''),
        'certificates': ssl.create_default_context(cafile='/etc/pki/tls/certs/ca-bundle.crt').cert_store_stats()['x509'] > 50,
        'programs': [name for name in ('curl', 'python', 'python3', 'tar') if not shutil.which(name)],
        'child': subprocess.run(['python3', '-c', child], capture_output=True, text=True).stdout.strip() == boto3.__version__,
        'time': os.stat(__file__).st_mtime,
    }
";
    let container = guest.container(&Function::python_files(&[("app.py", app)])).await;
    let response = guest.invoke(&container, json!({})).await;
    let seen = answer(&response);
    for (what, is) in [
        ("localhost", json!("127.0.0.1")),
        ("host", json!("127.0.0.1")),
        ("user", json!("sbx_user1051")),
        ("group", json!("sbx_user1051")),
        ("service", json!(443)),
        ("protocol", json!(6)),
        ("locale", json!("en_US.UTF-8")),
        ("certificates", json!(true)),
        ("programs", Value::Array(vec![])),
        ("child", json!(true)),
        // Of the zip, whose entries are of 1980.
        ("time", json!(315_532_800.0)),
    ] {
        assert_eq!(seen[what], is, "{what}");
    }
    assert_eq!(log(&response), "by /dev/stdout\nby /dev/stderr\n");
}
