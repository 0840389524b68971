//! Calendar dates of the wall clock, for the `date` field of answers and for log lines.

use crate::base::unix_millis;

/// A moment in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    /// Year, as in 2026.
    pub year: i64,
    /// 1 to 12.
    pub month: usize,
    /// 1 to 31.
    pub day: i64,
    /// 0 is Sunday.
    pub weekday: usize,
    /// 0 to 23.
    pub hour: i64,
    /// 0 to 59.
    pub minute: i64,
    /// 0 to 59.
    pub second: i64,
    /// 0 to 999.
    pub millis: u32,
}

const WEEKDAYS: [&str; 7] = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"];
const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

impl Date {
    /// Now, by the wall clock; never used to decide anything.
    pub fn now() -> Self {
        Self::from_unix_millis(unix_millis())
    }

    /// The moment `unix_millis` after 1970-01-01T00:00:00Z (Hinnant's `civil_from_days`).
    pub fn from_unix_millis(unix_millis: u64) -> Self {
        let seconds = i64::try_from(unix_millis / 1000).unwrap_or(i64::MAX);
        let millis = u32::try_from(unix_millis % 1000).unwrap_or(0);
        let days = seconds.div_euclid(86_400);
        let rest = seconds.rem_euclid(86_400);
        // days since 0000-03-01, so that a leap day is the last day of its year
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        Self {
            year,
            month: usize::try_from(month).unwrap_or(1),
            day,
            weekday: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
            millis,
        }
    }

    /// As logs write it: `2026-11-21T09:10:03.000Z` (RFC 3339).
    pub fn rfc3339(&self) -> String {
        let Self { year, month, day, hour, minute, second, millis, .. } = self;
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
    }

    /// As HTTP writes it: `Sat, 21 Nov 2026 09:10:03 GMT` (RFC 9110 §5.6.7).
    pub fn http(&self) -> String {
        format!(
            "{}, {:02} {} {} {:02}:{:02}:{:02} GMT",
            WEEKDAYS[self.weekday % 7],
            self.day,
            MONTHS[(self.month + 11) % 12],
            self.year,
            self.hour,
            self.minute,
            self.second
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let http = |seconds: u64| Date::from_unix_millis(seconds * 1000).http();
        assert_eq!(http(0), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(http(1_795_252_203), "Sat, 21 Nov 2026 09:10:03 GMT");
        assert_eq!(http(951_782_400), "Tue, 29 Feb 2000 00:00:00 GMT");
        assert_eq!(http(4_107_542_399), "Sun, 28 Feb 2100 23:59:59 GMT");
        assert_eq!(Date::from_unix_millis(951_782_400_007).rfc3339(), "2000-02-29T00:00:00.007Z");
    }
}
