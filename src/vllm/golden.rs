//! Recorded bytes of a real vLLM, for tests: `real-vllm/golden/<set>/<case>.{req,resp}` of the shared folder,
//! which `VLLM_PROXY_SHARED` names, or which lies beside an ancestor of this package.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// One recorded exchange.
#[derive(Debug)]
pub(crate) struct Case {
    /// `<set>/<case>`.
    pub(crate) name: String,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Case {
    /// Method and path, without the query.
    pub(crate) fn line(&self) -> Option<(String, String)> {
        let line = self.request.split(|&b| b == b'\r').next()?;
        let mut words = str::from_utf8(line).ok()?.split(' ');
        let (method, target) = (words.next()?, words.next()?);
        let path = target.split('?').next()?;
        path.starts_with('/').then(|| (method.to_owned(), path.to_owned()))
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        header(&self.request, name)
    }

    pub(crate) fn answer_header(&self, name: &str) -> Option<String> {
        header(&self.answer, name)
    }

    pub(crate) fn request_body(&self) -> &[u8] {
        split(&self.request).1
    }

    /// Zero where the server never answered.
    pub(crate) fn status(&self) -> u16 {
        str::from_utf8(self.answer.get(9..12).unwrap_or_default()).unwrap().parse().unwrap_or(0)
    }

    pub(crate) fn reason(&self) -> String {
        let line = self.answer.split(|&b| b == b'\r').next().unwrap();
        String::from_utf8_lossy(&line[13..]).into_owned()
    }

    pub(crate) fn answer_body(&self) -> &[u8] {
        split(&self.answer).1
    }
}

fn header(message: &[u8], name: &str) -> Option<String> {
    let head = String::from_utf8_lossy(split(message).0).into_owned();
    head.lines().skip(1).find_map(|line| {
        let (field, value) = line.split_once(':')?;
        field.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
    })
}

fn split(message: &[u8]) -> (&[u8], &[u8]) {
    let end = memchr::memmem::find(message, b"\r\n\r\n").unwrap_or(message.len());
    (&message[..end], message.get(end + 4..).unwrap_or_default())
}

/// The case `<set>/<case>`.
pub(crate) fn case(name: &str) -> Case {
    let read = |suffix: &str| {
        let path = folder().join(format!("{name}.{suffix}"));
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    Case { name: name.to_owned(), request: read("req"), answer: read("resp") }
}

/// Every case of every set.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for set in fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir())
    {
        for file in fs::read_dir(&set).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|extension| extension == "req") {
                let part = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_owned();
                cases.push(case(&format!("{}/{}", set.file_name().unwrap().to_str().unwrap(), part(&file))));
            }
        }
    }
    assert!(cases.len() > 300, "only {} golden cases were found", cases.len());
    cases
}

fn folder() -> PathBuf {
    shared().join("real-vllm/golden")
}

/// The shared folder.
#[expect(clippy::disallowed_methods, reason = "a test finds its data by the environment")]
pub(crate) fn shared() -> PathBuf {
    if let Ok(shared) = std::env::var("VLLM_PROXY_SHARED") {
        return PathBuf::from(shared);
    }
    let found = Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .map(|ancestor| ancestor.join("shared"))
        .find(|shared| shared.join("real-vllm/golden").is_dir());
    found.expect("no shared/real-vllm/golden beside an ancestor of this package; set VLLM_PROXY_SHARED")
}
