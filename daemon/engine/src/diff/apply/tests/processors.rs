//! Stream processors.

use super::*;

#[test]
fn processors_run_in_a_chain_and_their_failures_are_told() {
    let script = |id: &str, accepts: &str, returns: &str, script: &str| Processor {
        id: id.to_owned(),
        accepts: vec![accepts.to_owned()],
        returns: returns.to_owned(),
        path: "sh".to_owned(),
        args: vec!["-c".to_owned(), script.to_owned()],
        env: vec!["ADDED=yes".to_owned()],
    };
    let layer = Tar::default().file("a", &"x".repeat(3_000_000)).end();
    let mut blob = Compressor::new(Compression::Gzip, Vec::new()).unwrap();
    blob.write_all(&layer).unwrap();
    let blob = blob.finish().unwrap();
    let processors = [
        script(
            "one",
            "x/one",
            "x/two",
            "test $ADDED = yes; test $(wc -c <&3) -gt 5 && cat",
        ),
        script(
            "two",
            "x/two",
            LAYER_TAR_GZIP,
            "test \"$STREAM_PROCESSOR_MEDIATYPE\" = x/two && cat",
        ),
        script(
            "fails",
            "x/fails",
            LAYER_TAR,
            "cat >/dev/null; echo no key >&2; exit 3",
        ),
        script("deaf", "x/deaf", LAYER_TAR, "exit 0"),
        script(
            "stuck",
            "x/stuck",
            LAYER_TAR,
            "echo garbage; exec 1>&-; sleep 1000",
        ),
        script("loop", "x/loop", "x/loop", "cat"),
    ];
    let payload = Any {
        type_url: "secret".to_owned(),
        value: vec![1, 2, 3],
    };
    let options = ApplyOptions {
        processors: &processors,
        payloads: [("one".to_owned(), payload)].into(),
        ..ApplyOptions::default()
    };
    let run = |media_type: &str| {
        let dir = tempfile::tempdir().unwrap();
        apply(&blob[..], media_type, &[bind(dir.path())], &options)
    };
    assert_eq!(
        run("x/one").unwrap().diff_id,
        digest_text(Sha256::new_with_prefix(&layer))
    );
    let error = run("x/fails").unwrap_err();
    assert!(
        error.to_string().contains("exit status 3: no key"),
        "{error}"
    );
    assert_eq!(run("x/deaf").unwrap().size_bytes, 0);
    assert_eq!(
        run("x/stuck").unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    for unknown in [
        "x/none",
        "x/loop",
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
    ] {
        let error = run(unknown).unwrap_err();
        assert!(
            error.to_string().starts_with("no processor for media-type"),
            "{error}"
        );
    }
}
