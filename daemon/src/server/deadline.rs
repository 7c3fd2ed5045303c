//! How long a client waits for an answer: its `grpc-timeout` header (gRPC over HTTP/2, Requests).

use std::convert::Infallible;
use std::time::Duration;

use http::{HeaderMap, Response};
use tonic::Status;
use tonic::body::Body;

/// The time a request may take, if its client said one. A header that is malformed says none.
pub(super) fn of(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (value, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    // The specification allows eight digits.
    if value.len() > 8 || !value.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = value.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// `answer`, or once `limit` has passed the code that says so; the request is then given up.
pub(super) async fn keep(
    limit: Option<Duration>,
    answer: impl Future<Output = Result<Response<Body>, Infallible>>,
) -> Result<Response<Body>, Infallible> {
    let Some(limit) = limit else {
        return answer.await;
    };
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer,
        // Clients of the reference know these words.
        Err(_) => Ok(Status::deadline_exceeded("context deadline exceeded").into_http()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_those_of_the_specification() {
        let limit = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", http::HeaderValue::from_static(text));
            of(&headers)
        };
        assert_eq!(limit("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(limit("3M"), Some(Duration::from_secs(180)));
        assert_eq!(limit("4S"), Some(Duration::from_secs(4)));
        assert_eq!(limit("99999999m"), Some(Duration::from_millis(99_999_999)));
        assert_eq!(limit("7u"), Some(Duration::from_micros(7)));
        assert_eq!(limit("0n"), Some(Duration::ZERO));
        for bad in ["", "S", "5", "5x", "-5S", "123456789S", "+5S"] {
            assert_eq!(limit(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn what_takes_longer_is_given_up() {
        let late = keep(Some(Duration::from_millis(5)), std::future::pending()).await;
        let code = late.map(|r| r.headers().get("grpc-status").cloned());
        assert_eq!(
            code.ok().flatten(),
            Some(http::HeaderValue::from_static("4"))
        );
        let quick = async { Ok(Response::new(Body::empty())) };
        let quick = keep(Some(Duration::from_secs(60)), quick).await;
        assert!(quick.is_ok_and(|r| r.headers().is_empty()));
    }
}
