//! The environment variables of a function, as Lambda documents them (AWS Lambda Developer Guide, "Working with Lambda
//! environment variables").

use std::collections::BTreeMap;

use stoker_proto::runtimes::TASK_ROOT;

use super::{Function, Runtime};
use crate::runtime_api::Identity;

/// Where the image may keep a runtime's own libraries.
const RUNTIME_DIR: &str = "/var/runtime";
/// Where the Runtime API answers in every container.
pub(crate) const RUNTIME_API: &str = "127.0.0.1:9001";
/// The version that functions, those who watch them and those who read their logs are told: what is not published has no other
/// name (AWS Lambda Developer Guide, "Manage Lambda function versions").
pub(super) const VERSION: &str = "$LATEST";
/// Lambda's SDKs want a region. Nothing here depends on it.
pub(crate) const REGION: &str = "us-east-1";

/// What is about the runtime's process alone: extensions have all else of a function's environment (AWS Lambda Developer
/// Guide, "Using the Lambda Extensions API to create extensions").
const NOT_FOR_EXTENSIONS: [&str; 10] = [
    "AWS_EXECUTION_ENV",
    "AWS_LAMBDA_LOG_GROUP_NAME",
    "AWS_LAMBDA_LOG_STREAM_NAME",
    "AWS_XRAY_CONTEXT_MISSING",
    "AWS_XRAY_DAEMON_ADDRESS",
    "LAMBDA_RUNTIME_DIR",
    "LAMBDA_TASK_ROOT",
    "_AWS_XRAY_DAEMON_ADDRESS",
    "_AWS_XRAY_DAEMON_PORT",
    "_HANDLER",
];

/// Whether external extensions have the variable of this name.
pub(super) fn is_for_extensions(name: &[u8]) -> bool {
    !NOT_FOR_EXTENSIONS.iter().any(|reserved| reserved.as_bytes() == name)
}

/// Whether a variable, `NAME=VALUE`, has this name.
pub(super) fn is(variable: &str, name: &str) -> bool {
    variable.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))
}

/// Whether one of them, `NAME=VALUE` each, has this name.
pub(super) fn has(variables: &[String], name: &str) -> bool {
    variables.iter().any(|variable| is(variable, name))
}

/// The name that follows the last `/` of a resource name.
pub(crate) fn short_name(resource: &str) -> &str {
    resource.rsplit('/').next().unwrap_or(resource)
}

/// The ARN that a function sees as its own: as one that is invoked without a version.
fn arn(function: &Function) -> String {
    format!(
        "arn:aws:lambda:{REGION}:{}:function:{}",
        function.account,
        short_name(&function.name)
    )
}

/// What a function and its extensions are told of it by the Runtime API.
pub(crate) fn identity(function: &Function) -> Identity {
    Identity {
        arn: arn(function),
        name: short_name(&function.name).to_owned(),
        version: VERSION.to_owned(),
        handler: function.handler.clone(),
        account: function.account.clone(),
        memory_mib: function.amount.memory_mib,
    }
}

/// Everything in the function's environment: Lambda's defaults, over them the customer's, over these what is reserved.
pub(super) fn variables(function: &Function, container: &str) -> BTreeMap<String, String> {
    let mut variables = defaults();
    variables.extend(function.environment.clone());
    variables.extend(reserved(function, container));
    variables
}

/// What a customer may set otherwise.
fn defaults() -> BTreeMap<String, String> {
    let path = "/var/lang/bin:/usr/local/bin:/usr/bin:/bin:/opt/bin";
    let libraries = format!("/lib64:/usr/lib64:{RUNTIME_DIR}:{RUNTIME_DIR}/lib:{TASK_ROOT}:{TASK_ROOT}/lib:/opt/lib");
    [
        ("PATH", path),
        ("LD_LIBRARY_PATH", &libraries),
        ("LANG", "en_US.UTF-8"),
        ("TZ", ":UTC"),
        // That nothing is traced is no reason to fail.
        ("AWS_XRAY_CONTEXT_MISSING", "LOG_ERROR"),
        // The only place that can be written to.
        ("HOME", "/tmp"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// What a customer may not set.
fn reserved(function: &Function, container: &str) -> BTreeMap<String, String> {
    let name = short_name(&function.name);
    let mut variables: BTreeMap<String, String> = [
        ("_HANDLER", function.handler.clone()),
        ("AWS_LAMBDA_RUNTIME_API", RUNTIME_API.to_owned()),
        ("LAMBDA_TASK_ROOT", TASK_ROOT.to_owned()),
        ("LAMBDA_RUNTIME_DIR", RUNTIME_DIR.to_owned()),
        ("AWS_REGION", REGION.to_owned()),
        ("AWS_DEFAULT_REGION", REGION.to_owned()),
        ("AWS_LAMBDA_FUNCTION_NAME", name.to_owned()),
        ("AWS_LAMBDA_FUNCTION_VERSION", VERSION.to_owned()),
        (
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE",
            function.amount.memory_mib.to_string(),
        ),
        ("AWS_LAMBDA_LOG_GROUP_NAME", format!("/aws/lambda/{name}")),
        (
            "AWS_LAMBDA_LOG_STREAM_NAME",
            format!("{}[{VERSION}]{container}", function.account),
        ),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    // Lambda defines it for managed runtimes only.
    if function.runtime == Runtime::Python311 {
        variables.insert("AWS_EXECUTION_ENV".to_owned(), "AWS_Lambda_python3.11".to_owned());
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::tests::function;

    #[test]
    fn customers_override_defaults_but_nothing_reserved() {
        let mut function = function(Runtime::Python311);
        function.environment = [
            ("LANG", "de_DE.UTF-8"),
            ("TABLE", "orders"),
            ("AWS_LAMBDA_RUNTIME_API", "10.0.0.1:80"),
            ("_HANDLER", "other.handler"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        let variables = variables(&function, "01J");
        let value = |name: &str| variables.get(name).map(String::as_str);
        assert_eq!(value("LANG"), Some("de_DE.UTF-8"));
        assert_eq!(value("TABLE"), Some("orders"));
        assert_eq!(value("AWS_LAMBDA_RUNTIME_API"), Some("127.0.0.1:9001"));
        assert_eq!(value("_HANDLER"), Some("app.handler"));
        assert_eq!(value("AWS_LAMBDA_FUNCTION_NAME"), Some("thumbs"));
        assert_eq!(value("AWS_LAMBDA_FUNCTION_VERSION"), Some("$LATEST"));
        assert_eq!(value("AWS_LAMBDA_FUNCTION_MEMORY_SIZE"), Some("128"));
        assert_eq!(value("AWS_EXECUTION_ENV"), Some("AWS_Lambda_python3.11"));
        assert_eq!(value("AWS_LAMBDA_LOG_STREAM_NAME"), Some("acme[$LATEST]01J"));
    }

    #[test]
    fn an_os_only_runtime_has_no_execution_environment() {
        let variables = variables(&function(Runtime::Provided), "01J");
        assert!(!variables.contains_key("AWS_EXECUTION_ENV"));
        assert_eq!(
            arn(&function(Runtime::Provided)),
            "arn:aws:lambda:us-east-1:acme:function:thumbs"
        );
    }
}
