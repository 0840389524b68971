//! Where the model's name stands outside of JSON: a field of a form (RFC 7578), a parameter of the query.
//!
//! The form is searched while it arrives, so that an upload need not be read whole to learn its model. It follows
//! python-multipart as Starlette uses it, which is what vLLM reads forms with; what that refuses, a worker refuses.

use std::{borrow::Cow, ops::Range};

use memchr::{memchr, memmem};

/// As long as python-multipart allows.
const BOUNDARY_BYTES: usize = 256;
/// Largest head of a part; python-multipart allows 8 lines of 4 KiB.
const PART_HEAD_BYTES: usize = 8 * (4096 + 128);
/// Largest name of a model that is waited for.
const MODEL_BYTES: usize = 64 * 1024;
/// Spaces that may pad a boundary line (RFC 2046 §5.1.1 sets no limit).
const PADDING_BYTES: usize = 64;

/// The boundary of a form, from the value of its `Content-Type`. `None`: it is no form, or has none that could be
/// used.
pub fn boundary(content_type: &[u8]) -> Option<Vec<u8>> {
    let mut parameters = Parameters::new(content_type);
    if !parameters.first.eq_ignore_ascii_case(b"multipart/form-data") {
        return None;
    }
    let boundary = parameters.last(b"boundary")?;
    (1..=BOUNDARY_BYTES).contains(&boundary.len()).then(|| boundary.into_owned())
}

/// What a form says of its model so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MultipartFact {
    /// To be seen when more of it has come.
    NeedMore,
    /// The field is complete; its value, which may be empty, in the bytes given.
    Model {
        /// To be read with [`field_text`].
        value: Range<usize>,
    },
    /// It has no such field, or is no form that vLLM could read.
    NoModel,
}

/// Looks for the field `model` in a growing form. Every byte is looked at once.
#[derive(Debug)]
pub struct ModelField {
    /// Line end, two hyphens, boundary.
    delimiter: Vec<u8>,
    place: Place,
    /// Everything before has been looked at.
    at: usize,
}

#[derive(Debug, Clone)]
enum Place {
    /// Before the first boundary.
    Preamble,
    /// In the head of a part that begins here.
    Head { start: usize },
    /// In the value of a part that begins here.
    Content { start: usize, is_model: bool },
    /// Nothing that comes can change it.
    Decided(MultipartFact),
}

impl ModelField {
    /// A search in a form with this [`boundary`].
    pub fn new(boundary: &[u8]) -> Self {
        Self { delimiter: [b"\r\n--", boundary].concat(), place: Place::Preamble, at: 0 }
    }

    /// What the form says, of which `so_far` are all bytes that came: those of the last call and perhaps more.
    /// `complete`: no more will come.
    pub fn scan(&mut self, so_far: &[u8], complete: bool) -> MultipartFact {
        loop {
            let went_on = match self.place.clone() {
                Place::Decided(fact) => return fact,
                Place::Preamble => self.content(so_far, complete, None),
                Place::Head { start } => self.head(so_far, start),
                Place::Content { start, is_model } => {
                    self.content(so_far, complete, is_model.then_some(start))
                }
            };
            if !went_on && complete {
                self.place = Place::Decided(MultipartFact::NoModel);
            } else if !went_on {
                return MultipartFact::NeedMore;
            }
        }
    }

    /// Looks for the end of a part's head. False: it has not come.
    fn head(&mut self, so_far: &[u8], start: usize) -> bool {
        // a head without lines ends with the line end of the boundary
        let from = self.at.saturating_sub(3).max(start - 2);
        let found = so_far.get(from..).and_then(|rest| memmem::find(rest, b"\r\n\r\n"));
        let end = found.map_or(so_far.len().saturating_sub(3), |found| from + found);
        if self.refuse_if(end.saturating_sub(start) > PART_HEAD_BYTES) {
            return true;
        }
        self.at = so_far.len();
        if found.is_none() {
            return false;
        }
        // as python-multipart, which wants a line end of its own before the next boundary
        self.at = end + 4;
        let lines = so_far.get(start..end).unwrap_or_default();
        self.place = Place::Content { start: self.at, is_model: is_model_field(lines) };
        true
    }

    /// Looks for the boundary that ends the value that begins at `model`, or what is not wanted. False: it has
    /// not come.
    fn content(&mut self, so_far: &[u8], complete: bool, model: Option<usize>) -> bool {
        let Some((end, length)) = self.next_delimiter(so_far) else {
            return self.refuse_if(model.is_some_and(|start| self.at.saturating_sub(start) > MODEL_BYTES));
        };
        if self.refuse_if(model.is_some_and(|start| end.saturating_sub(start) > MODEL_BYTES)) {
            return true;
        }
        let behind = end + length;
        match boundary_line(so_far.get(behind..).unwrap_or_default()) {
            Line::Unfinished if !complete => {
                self.at = end;
                return false;
            }
            Line::Unfinished | Line::Text => {
                self.at = end + 1;
                return true;
            }
            Line::Last | Line::Next(_) if model.is_some() => {
                let value = model.unwrap_or(end)..end;
                self.place = Place::Decided(MultipartFact::Model { value });
            }
            Line::Last => self.place = Place::Decided(MultipartFact::NoModel),
            Line::Next(skip) => {
                self.at = behind + skip;
                self.place = Place::Head { start: self.at };
            }
        }
        true
    }

    fn refuse_if(&mut self, too_large: bool) -> bool {
        if too_large {
            self.place = Place::Decided(MultipartFact::NoModel);
        }
        too_large
    }

    /// The next delimiter and its length; remembers up to where there is none.
    fn next_delimiter(&mut self, so_far: &[u8]) -> Option<(usize, usize)> {
        let first = self.delimiter.get(2..).unwrap_or_default();
        if self.at == 0 && matches!(self.place, Place::Preamble) {
            if so_far.starts_with(first) {
                return Some((0, first.len()));
            }
            if first.starts_with(so_far) {
                return None;
            }
        }
        let rest = so_far.get(self.at..)?;
        if let Some(found) = memmem::find(rest, &self.delimiter) {
            return Some((self.at + found, self.delimiter.len()));
        }
        self.at = self.at.max((so_far.len() + 1).saturating_sub(self.delimiter.len()));
        None
    }
}

/// What follows a delimiter.
enum Line {
    /// A part; bytes up to its head.
    Next(usize),
    /// The end of the form.
    Last,
    /// It was no delimiter: only text that begins like one.
    Text,
    /// Cannot be told yet.
    Unfinished,
}

fn boundary_line(behind: &[u8]) -> Line {
    let padding = behind.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    match behind.get(padding..).unwrap_or_default() {
        _ if padding > PADDING_BYTES => Line::Text,
        [b'-', b'-', ..] if padding == 0 => Line::Last,
        [b'\r', b'\n', ..] => Line::Next(padding + 2),
        [] | [b'\r'] => Line::Unfinished,
        [b'-'] if padding == 0 => Line::Unfinished,
        _ => Line::Text,
    }
}

/// Whether a part's head is that of a field, not a file, with the name `model`. The last `Content-Disposition`
/// counts.
fn is_model_field(lines: &[u8]) -> bool {
    let mut disposition: &[u8] = b"";
    for line in lines.split(|&byte| byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let Some(colon) = memchr(b':', line) else { continue };
        let (name, value) = line.split_at(colon);
        if name.trim_ascii().eq_ignore_ascii_case(b"content-disposition") {
            disposition = value.get(1..).unwrap_or_default();
        }
    }
    let mut parameters = Parameters::new(disposition);
    parameters.last(b"name").as_deref() == Some(b"model") && parameters.last(b"filename").is_none()
}

/// The `;`-separated parts of a header's value.
struct Parameters<'a> {
    /// What stands before the first of them.
    first: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Parameters<'a> {
    fn new(value: &'a [u8]) -> Self {
        let (first, rest) = part(value);
        Self { first: first.trim_ascii(), rest }
    }

    /// The value of `name`, its quotes taken off; of several the last. The extended names of RFC 2231 are no
    /// names here (RFC 7578 §4.2).
    fn last(&mut self, name: &[u8]) -> Option<Cow<'a, [u8]>> {
        let (mut found, mut rest) = (None, self.rest);
        while !rest.is_empty() {
            let (parameter, behind) = part(rest);
            rest = behind;
            if let Some(equals) = memchr(b'=', parameter)
                && let (key, value) = parameter.split_at(equals)
                && key.trim_ascii().eq_ignore_ascii_case(name)
            {
                found = Some(value.get(1..).unwrap_or_default().trim_ascii());
            }
        }
        found.map(unquoted)
    }
}

/// Cuts at the first `;` outside of quotes.
fn part(value: &[u8]) -> (&[u8], &[u8]) {
    let (mut quoted, mut escaped) = (false, false);
    for (at, &byte) in value.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b';' if !quoted => return (&value[..at], &value[at + 1..]),
            _ => {}
        }
    }
    (value, b"")
}

fn unquoted(value: &[u8]) -> Cow<'_, [u8]> {
    let [b'"', inner @ .., b'"'] = value else { return Cow::Borrowed(value) };
    if memchr(b'\\', inner).is_none() {
        return Cow::Borrowed(inner);
    }
    let mut plain = Vec::with_capacity(inner.len());
    let mut bytes = inner.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        let escaped = (byte == b'\\').then(|| bytes.next_if(|next| matches!(next, b'"' | b'\\')));
        plain.push(escaped.flatten().unwrap_or(byte));
    }
    Cow::Owned(plain)
}

/// A field's value as Starlette decodes it: UTF-8, else Latin-1.
pub fn field_text(value: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(value) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => Cow::Owned(value.iter().copied().map(char::from).collect()),
    }
}

/// The last parameter `model` of a query (without its question mark), decoded.
pub fn query_model(query: &str) -> Option<Cow<'_, str>> {
    let pairs = url::form_urlencoded::parse(query.as_bytes());
    pairs.filter(|(name, _)| name == "model").last().map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::vllm::golden;

    /// Feeds the form in the given pieces; the model and after how many bytes it was known.
    fn fed(form: &[u8], boundary: &[u8], cuts: &[usize]) -> (Option<String>, usize) {
        let mut field = ModelField::new(boundary);
        for &cut in cuts.iter().chain(&[form.len()]) {
            let complete = cut == form.len();
            match field.scan(&form[..cut], complete) {
                MultipartFact::NeedMore => assert!(!complete, "a whole form needs no more"),
                MultipartFact::NoModel => return (None, cut),
                MultipartFact::Model { value } => {
                    return (Some(field_text(&form[value]).into_owned()), cut);
                }
            }
        }
        unreachable!("the last piece decides");
    }

    fn model(form: &[u8], boundary: &[u8]) -> Option<String> {
        let (whole, _) = fed(form, boundary, &[]);
        for cut in 0..form.len() {
            assert_eq!(fed(form, boundary, &[cut]).0, whole, "cut at {cut}");
        }
        let every: Vec<usize> = (0..form.len()).collect();
        assert_eq!(fed(form, boundary, &every).0, whole, "byte by byte");
        whole
    }

    fn part(head: &str, content: &str) -> String {
        format!("--B\r\n{head}\r\n\r\n{content}\r\n")
    }

    const MODEL: &str = "Content-Disposition: form-data; name=\"model\"";
    const FILE: &str =
        "Content-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\nContent-Type: audio/wav";

    #[test]
    fn a_boundary_may_be_quoted_and_stand_anywhere() {
        let found = |value: &str| boundary(value.as_bytes()).map(|found| String::from_utf8(found).unwrap());
        assert_eq!(found("multipart/form-data; boundary=XgoldenX").as_deref(), Some("XgoldenX"));
        assert_eq!(
            found("Multipart/Form-Data;charset=utf-8; BOUNDARY=\"a b;c=d\"").as_deref(),
            Some("a b;c=d")
        );
        assert_eq!(found("multipart/form-data; boundary = \"a\\\"b\" ; x=y").as_deref(), Some("a\"b"));
        assert_eq!(found("multipart/form-data; x=\"boundary=no;\"; boundary=yes").as_deref(), Some("yes"));
        for none in [
            "application/json",
            "multipart/mixed; boundary=a",
            "multipart/form-data",
            "multipart/form-data; boundary=",
            "multipart/form-data; boundary=\"\"",
            "multipart/form-data; boundary*=utf-8''a",
            "",
        ] {
            assert_eq!(found(none), None, "{none}");
        }
        assert_eq!(found(&format!("multipart/form-data; boundary={}", "x".repeat(257))), None);
    }

    #[test]
    fn the_field_is_found_before_and_behind_the_file() {
        let (model_part, file_part) = (part(MODEL, "whisper"), part(FILE, "RIFF\r\n--\r\n--A\r\n\0\u{fffd}"));
        assert_eq!(model(format!("{model_part}{file_part}--B--\r\n").as_bytes(), b"B").unwrap(), "whisper");
        assert_eq!(model(format!("{file_part}{model_part}--B--").as_bytes(), b"B").unwrap(), "whisper");
        assert_eq!(model(format!("{file_part}--B--\r\n{model_part}").as_bytes(), b"B"), None);
    }

    #[test]
    fn the_field_is_reported_as_soon_as_it_is_complete() {
        let form = format!("{}{}", part(MODEL, "whisper"), part(FILE, &"x".repeat(1000)));
        let cuts: Vec<usize> = (0..form.len()).collect();
        let (found, known_after) = fed(form.as_bytes(), b"B", &cuts);
        assert_eq!(found.as_deref(), Some("whisper"));
        assert_eq!(known_after, part(MODEL, "whisper").len() + "--B\r\n".len());
    }

    #[test]
    fn the_name_may_be_written_in_any_way() {
        for head in [
            "Content-Disposition: form-data; name=model",
            "content-disposition:form-data;name=\"model\"",
            "CONTENT-DISPOSITION: form-data; x=\"; name=no\"; NAME = \"mod\\\"el\"; name=\"model\"",
            "Content-Type: text/plain\r\nContent-Disposition: form-data; name=\"model\"\r\nX: y",
            "Content-Disposition: form-data; name=\"model\"; filename*=utf-8''a",
        ] {
            let form = format!("{}--B--\r\n", part(head, "m"));
            assert_eq!(model(form.as_bytes(), b"B").as_deref(), Some("m"), "{head}");
        }
        for head in [
            "Content-Disposition: form-data; name=\"models\"",
            "Content-Disposition: form-data; name=\"Model\"",
            "Content-Disposition: form-data; filename=\"model\"; name=\"model\"",
            "Content-Disposition: form-data; name*=model",
            "Content-Disposition: form-data; x=\"name=model; \\\"; name=model\"",
            "X-Content-Disposition: form-data; name=model",
            "Content-Type: name=model",
        ] {
            let form = format!("{}--B--\r\n", part(head, "m"));
            assert_eq!(model(form.as_bytes(), b"B"), None, "{head}");
        }
    }

    #[test]
    fn a_file_that_looks_like_a_form_is_no_form() {
        let inner = format!("\n--B\n{MODEL}\n\nno\r\n--BB\r\n{MODEL}\r\n\r\nno\r\n--B-\r\n{MODEL}\r\n\r\nno");
        let form = format!("{}{}--B--\r\n", part(FILE, &inner), part(MODEL, "yes"));
        assert_eq!(model(form.as_bytes(), b"B").as_deref(), Some("yes"));
        let other = format!("{}--B--\r\n", part(FILE, &inner));
        assert_eq!(model(other.as_bytes(), b"B"), None);
    }

    #[test]
    fn preamble_padding_and_empty_parts_are_passed_over() {
        let form = format!("hello --B\r\n--B \t\r\n\r\nx\r\n{}--B--", part(MODEL, "m"));
        assert_eq!(model(form.as_bytes(), b"B").as_deref(), Some("m"));
        assert_eq!(model(format!("\r\n{}--B--", part(MODEL, "")).as_bytes(), b"B").as_deref(), Some(""));
    }

    #[test]
    fn what_is_no_form_has_no_model() {
        for form in [
            "",
            "-",
            "--B",
            "--B--",
            "model=m",
            "--B\r\n",
            "--B\r\nContent-Disposition: form-data; name=model",
        ] {
            assert_eq!(model(form.as_bytes(), b"B"), None, "{form}");
        }
        let unfinished = format!("--B\r\n{MODEL}\r\n\r\nm");
        assert_eq!(model(unfinished.as_bytes(), b"B"), None, "vLLM refuses a form that is cut");
    }

    #[test]
    fn heads_and_values_are_bounded() {
        let mut field = ModelField::new(b"B");
        let endless = format!("--B\r\nX: {}", "x".repeat(PART_HEAD_BYTES + 8));
        assert_eq!(field.scan(endless.as_bytes(), false), MultipartFact::NoModel);
        let mut field = ModelField::new(b"B");
        let endless = format!("--B\r\n{MODEL}\r\n\r\n{}", "x".repeat(MODEL_BYTES + 8));
        assert_eq!(field.scan(endless.as_bytes(), false), MultipartFact::NoModel);
    }

    #[test]
    fn a_value_that_is_not_utf8_is_latin_1() {
        let form = [format!("--B\r\n{MODEL}\r\n\r\n").as_bytes(), b"gr\xf6\xdfe", b"\r\n--B--"].concat();
        assert_eq!(model(&form, b"B").as_deref(), Some("größe"));
    }

    #[test]
    fn the_golden_form_names_its_model() {
        let case = golden::case("py-0.32-default/transcriptions_on_chat_model");
        let boundary = boundary(case.header("content-type").unwrap().as_bytes()).unwrap();
        assert_eq!(model(case.request_body(), &boundary).as_deref(), Some("tiny-chat"));
    }

    #[test]
    fn the_last_model_of_a_query_counts() {
        assert_eq!(query_model("a=b&model=m&x").as_deref(), Some("m"));
        assert_eq!(query_model("model=a&model=b%2Fc+d%20%C3%A9").as_deref(), Some("b/c d é"));
        assert_eq!(query_model("mod%65l=m").as_deref(), Some("m"));
        assert_eq!(query_model("model=").as_deref(), Some(""));
        assert_eq!(query_model("model=%ff%").as_deref(), Some("\u{fffd}%"));
        for none in ["", "models=m", "xmodel=m", "Model=m"] {
            assert_eq!(query_model(none), None, "{none}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_pieces_of_any_form_are_read_alike(
            words in proptest::collection::vec(proptest::sample::select(vec![
                "\r\n", "--B", "--", "-", "\r", "\n", "B", " ", "x", MODEL, FILE, "\r\n\r\n", "--B\r\n", "\r\n--B\r\n",
            ]), 0..30),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
        ) {
            let form = words.concat();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(form.len() + 1)).collect();
            cuts.sort_unstable();
            cuts.retain(|&cut| cut < form.len());
            prop_assert_eq!(fed(form.as_bytes(), b"B", &cuts).0, fed(form.as_bytes(), b"B", &[]).0);
        }
    }
}
