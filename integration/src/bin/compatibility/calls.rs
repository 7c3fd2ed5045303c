//! What a daemon has answered, by its own counters.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Context as _;
use lighter_integration::Result;

/// Answers to one method: how often each code.
pub(crate) type Answers = BTreeMap<String, u64>;
/// What a client's run was answered, by `service/Method`.
pub(crate) type Calls = BTreeMap<String, Answers>;

/// Every counter of answered calls.
pub(crate) fn counters(address: &str) -> Result<Calls> {
    let mut stream = TcpStream::connect(address).context("connect to the metrics")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET /v1/metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let mut calls = Calls::new();
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("grpc_server_handled_total{") else {
            continue;
        };
        let Some((labels, count)) = rest.rsplit_once("} ") else {
            continue;
        };
        let label = |name: &str| {
            let start = labels.find(&format!("{name}=\""))? + name.len() + 2;
            labels[start..].split('"').next()
        };
        let (Some(service), Some(method), Some(code)) = (
            label("grpc_service"),
            label("grpc_method"),
            label("grpc_code"),
        ) else {
            continue;
        };
        let answers = calls.entry(format!("{service}/{method}")).or_default();
        // Counters are written as floating-point numbers by some.
        let count = count.trim().split('.').next().unwrap_or_default();
        *answers.entry(code.to_owned()).or_default() += count.parse::<u64>()?;
    }
    Ok(calls)
}

/// `now` without what was counted `before` the client came.
pub(crate) fn since(before: &Calls, now: Calls) -> Calls {
    now.into_iter()
        .filter_map(|(method, mut answers)| {
            if let Some(old) = before.get(&method) {
                for (code, count) in old {
                    if let Some(new) = answers.get_mut(code) {
                        *new = new.saturating_sub(*count);
                    }
                }
            }
            answers.retain(|_, count| *count > 0);
            (!answers.is_empty()).then_some((method, answers))
        })
        .collect()
}
