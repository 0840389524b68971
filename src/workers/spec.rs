//! A worker as the operator describes it.

use std::{fmt, str::FromStr};

use crate::workers::{UrlError, WorkerUrl};

/// What the operator says of a worker besides its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Traits {
    /// Workers of a higher priority are used first; the others when those are saturated.
    pub priority: i32,
    /// Relative price of a request: a worker that costs 2 is given half of what one that costs 1 is given.
    /// Greater than 0.
    pub cost: f64,
    /// Requests of ours that it may have in flight at most; `None`: no limit.
    pub max_concurrent_requests: Option<u32>,
}

impl Default for Traits {
    fn default() -> Self {
        Self { priority: 0, cost: 1.0, max_concurrent_requests: None }
    }
}

/// A worker as the operator describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerSpec {
    /// Where it is.
    pub url: WorkerUrl,
    /// Which of the server's data-parallel engines it is; `None`: the server has one, or chooses itself.
    pub rank: Option<u32>,
    /// What else is said of it.
    pub traits: Traits,
}

impl From<WorkerUrl> for WorkerSpec {
    fn from(url: WorkerUrl) -> Self {
        Self { url, rank: None, traits: Traits::default() }
    }
}

impl WorkerSpec {
    /// One of each data-parallel rank of the server; of one rank the server itself. The operator's limit on
    /// concurrent requests holds for each of them.
    pub fn ranks(self, count: u32) -> impl Iterator<Item = Self> {
        let several = count > 1;
        (0..count.max(1)).map(move |rank| Self { rank: several.then_some(rank), ..self.clone() })
    }
}

/// An attribute that may stand behind the `#` of a worker.
struct Attribute {
    key: &'static str,
    allowed: &'static str,
    /// Takes the value over; `None` if it is not allowed.
    read: fn(&mut Traits, &str) -> Option<()>,
    /// The value to show, where it is not the default.
    show: fn(&Traits) -> Option<String>,
}

const ATTRIBUTES: [Attribute; 3] = [
    Attribute {
        key: "priority",
        allowed: "priority must be a whole number from -2147483648 to 2147483647",
        read: |traits, value| value.parse().ok().map(|value| traits.priority = value),
        show: |traits| (traits.priority != 0).then(|| traits.priority.to_string()),
    },
    Attribute {
        key: "cost",
        allowed: "cost must be a number greater than 0",
        read: |traits, value| {
            let cost: f64 = value.parse().ok()?;
            (cost.is_finite() && cost > 0.0).then(|| traits.cost = cost)
        },
        show: |traits| (traits.cost != 1.0).then(|| traits.cost.to_string()),
    },
    Attribute {
        key: "max_concurrent_requests",
        allowed: "max_concurrent_requests must be a whole number from 1 to 4294967295",
        read: |traits, value| {
            let most = value.parse().ok().filter(|&most| most > 0)?;
            traits.max_concurrent_requests = Some(most);
            Some(())
        },
        show: |traits| traits.max_concurrent_requests.map(|most| most.to_string()),
    },
];

impl FromStr for WorkerSpec {
    type Err = UrlError;

    /// `url[#key=value[&key=value]…]`.
    fn from_str(text: &str) -> Result<Self, UrlError> {
        let (url, attributes) = match text.split_once('#') {
            Some((url, attributes)) => (url, Some(attributes)),
            None => (text, None),
        };
        let url: WorkerUrl = url.parse()?;
        let mut traits = Traits::default();
        let mut seen = Vec::new();
        for part in attributes.into_iter().flat_map(|attributes| attributes.split('&')) {
            let wrong = |problem| UrlError::Attribute { attribute: part.to_owned(), problem };
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let known = ATTRIBUTES.iter().find(|attribute| attribute.key == key);
            let attribute = known.ok_or_else(|| {
                wrong(
                    "what may stand there is priority=…, cost=… and max_concurrent_requests=…, joined by `&`",
                )
            })?;
            if seen.contains(&key) {
                return Err(wrong("it stands there twice"));
            }
            seen.push(key);
            (attribute.read)(&mut traits, value).ok_or_else(|| wrong(attribute.allowed))?;
        }
        Ok(Self { url, rank: None, traits })
    }
}

impl fmt::Display for WorkerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.url.fmt(f)?;
        let mut before = '#';
        for attribute in &ATTRIBUTES {
            if let Some(value) = (attribute.show)(&self.traits) {
                write!(f, "{before}{}={value}", attribute.key)?;
                before = '&';
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<WorkerSpec, UrlError> {
        text.parse()
    }

    #[test]
    fn attributes_stand_behind_the_url_and_are_shown_again() {
        let text = "http://a:8000/p#priority=-10&cost=0.5&max_concurrent_requests=8";
        let spec = parse(text).unwrap();
        assert_eq!(spec.url.as_str(), "http://a:8000/p");
        assert_eq!(spec.traits, Traits { priority: -10, cost: 0.5, max_concurrent_requests: Some(8) });
        assert_eq!(spec.to_string(), text);
        let plain = parse("http://a").unwrap();
        assert_eq!((plain.traits.clone(), plain.to_string()), (Traits::default(), "http://a:80".to_owned()));
        assert_eq!(parse("http://a#cost=1&priority=0").unwrap().traits, plain.traits);
    }

    #[test]
    fn an_attribute_that_is_not_understood_is_named_with_what_is_allowed() {
        for (attributes, named, allowed) in [
            ("cost=0", "cost=0", "greater than 0"),
            ("cost=-1", "cost=-1", "greater than 0"),
            ("cost=NaN", "cost=NaN", "greater than 0"),
            ("cost=inf", "cost=inf", "greater than 0"),
            ("priority=1.5", "priority=1.5", "a whole number"),
            ("priority=1&cost", "cost", "greater than 0"),
            ("max_concurrent_requests=0", "max_concurrent_requests=0", "from 1"),
            ("prio=1", "prio=1", "priority=…, cost=…"),
            ("", "", "priority=…, cost=…"),
            ("priority=1&priority=1", "priority=1", "twice"),
            ("priority=1#cost=2", "priority=1#cost=2", "a whole number"),
        ] {
            let error = parse(&format!("http://a#{attributes}")).unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{named}` behind")) && error.contains(allowed), "{error}");
        }
        assert!(matches!(parse("http://u:p@a#cost=2"), Err(UrlError::Extra(_))));
        assert!(matches!(parse("http://a?x=1#cost=2"), Err(UrlError::Extra(_))));
    }

    #[test]
    fn one_rank_is_the_server_itself() {
        let ranks = |count| {
            let spec = parse("http://a#cost=2").unwrap();
            let ranks: Vec<_> = spec.ranks(count).map(|spec| (spec.rank, spec.traits.cost)).collect();
            ranks
        };
        assert_eq!(ranks(1), [(None, 2.0)]);
        assert_eq!(ranks(2), [(Some(0), 2.0), (Some(1), 2.0)]);
    }
}
