//! How a number of slots is divided: the same in every proxy, from the same figures.
//!
//! Max-min fair (water-filling, as in Bertsekas and Gallager, *Data Networks* §6.5): all get the same, but nobody more
//! than it can use, and what that leaves is for the others. Whole slots; those that are left over go to the first, so
//! the order must be the same everywhere.

/// One part in so many may be kept for those who want nothing at the moment.
const IDLE_SHARE: u64 = 20;

/// Who gets how many of `limit` slots, given how many each wants. More than it wants only where nobody wants them: those
/// are divided equally, for what comes next. The sum is `limit`, or the number of those who want any if that is more:
/// with none for good, a proxy could only turn its clients away.
///
/// Who wants nothing has a slot nevertheless where one each is no more than a twentieth of all.
pub(super) fn fair(limit: u32, wants: &[u32]) -> Vec<u32> {
    let members = wants.len() as u64;
    let least = u32::from(u64::from(limit) >= IDLE_SHARE * members);
    let wants: Vec<(u32, u32)> = wants.iter().map(|&want| (0, want.max(least))).collect();
    let limit = at_least_one_each(limit, wants.iter().map(|want| want.1));
    let mut parts = fill(u64::from(limit), &wants);
    let left = u64::from(limit).saturating_sub(sum(&parts));
    if left > 0 && members > 0 {
        let (each, first) = (left / members, left % members);
        for (part, at) in parts.iter_mut().zip(0..) {
            let more = u32::try_from(each + u64::from(at < first)).unwrap_or(u32::MAX);
            *part = part.saturating_add(more);
        }
    }
    parts
}

/// What each can have of its `fair` part, or keeps, while others still hold more than theirs.
pub(super) fn attainable(limit: u32, fair: &[u32], held: &[u32]) -> Vec<u32> {
    let bounds = |(&fair, &held): (&u32, &u32)| (held, fair.max(held));
    let bounds: Vec<(u32, u32)> = fair.iter().zip(held).map(bounds).collect();
    fill(u64::from(limit), &bounds)
}

/// The limit, but one for each who wants any.
pub(super) fn at_least_one_each(limit: u32, wants: impl Iterator<Item = u32>) -> u32 {
    let wanting = wants.filter(|&want| want > 0).count();
    limit.max(u32::try_from(wanting).unwrap_or(u32::MAX))
}

pub(super) fn sum(parts: &[u32]) -> u64 {
    parts.iter().copied().map(u64::from).sum()
}

/// Divides `total` so that all have the same, as far as each has at least the first and at most the second of its
/// bounds. If the lower ones are too much already, it is these; if the upper ones are not enough, those.
fn fill(total: u64, bounds: &[(u32, u32)]) -> Vec<u32> {
    let at = |level: u32| bounds.iter().map(move |&(least, most)| level.min(most).max(least));
    let used = |level: u32| at(level).map(u64::from).sum::<u64>();
    if used(u32::MAX) <= total {
        return at(u32::MAX).collect();
    }
    // the highest level that is not too high, if there is one
    let (mut level, mut too_high) = (0, u32::MAX);
    while level + 1 < too_high {
        let middle = level + (too_high - level) / 2;
        if used(middle) <= total { level = middle } else { too_high = middle }
    }
    let mut parts: Vec<u32> = at(level).collect();
    let mut left = total.saturating_sub(sum(&parts));
    for (part, next) in parts.iter_mut().zip(at(level.saturating_add(1))) {
        if left > 0 && next > *part {
            *part = next;
            left -= 1;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn who_wants_less_than_an_equal_part_gets_it_and_the_rest_is_for_the_others() {
        assert_eq!(fair(12, &[2, 9, 9]), [2, 5, 5]);
        assert_eq!(fair(12, &[9, 2, 9, 0]), [5, 2, 5, 0]);
        assert_eq!(fair(10, &[9, 9, 9]), [4, 3, 3], "the first get what is left over");
        assert_eq!(fair(10, &[0, 0, 4]), [2, 2, 6], "what nobody wants is for what comes next");
        assert_eq!(fair(11, &[0, 0, 4]), [3, 2, 6]);
        assert_eq!(fair(60, &[0, 0, 99]), [1, 1, 58], "a twentieth is kept for who is idle");
        assert_eq!(fair(59, &[0, 0, 99]), [0, 0, 59]);
        assert_eq!(fair(7, &[]), [0; 0]);
        assert_eq!(fair(u32::MAX, &[u32::MAX, u32::MAX, 5]), [0x7fff_fffd, 0x7fff_fffd, 5]);
    }

    #[test]
    fn with_fewer_slots_than_proxies_everybody_who_wants_one_has_one() {
        assert_eq!(fair(2, &[5, 5, 0, 5]), [1, 1, 0, 1]);
        assert_eq!(fair(1, &[0, 0, 0]), [1, 0, 0]);
    }

    #[test]
    fn what_others_still_hold_is_missed_by_those_who_have_most() {
        assert_eq!(attainable(10, &[4, 3, 3], &[8, 0, 0]), [8, 1, 1]);
        assert_eq!(attainable(10, &[4, 3, 3], &[8, 2, 0]), [8, 2, 0], "what is held is kept");
        assert_eq!(attainable(10, &[4, 3, 3], &[7, 2, 0]), [7, 2, 1]);
        assert_eq!(attainable(10, &[4, 3, 3], &[4, 0, 0]), [4, 3, 3]);
        assert_eq!(attainable(10, &[4, 3, 3], &[9, 9, 0]), [9, 9, 0]);
    }

    fn wants() -> impl Strategy<Value = Vec<u32>> {
        let want = prop_oneof![3 => 0u32..50, 1 => 0u32..2, 1 => any::<u32>()];
        prop::collection::vec(want, 1..40)
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nobody_starves(limit in 1u32..2000, wants in wants()) {
            let parts = fair(limit, &wants);
            let all = at_least_one_each(limit, wants.iter().copied());
            prop_assert_eq!(sum(&parts), u64::from(all));
            let (members, total) = (wants.len() as u64, wants.iter().copied().map(u64::from).sum::<u64>());
            let equal = u64::from(limit) / members;
            for (&part, &want) in parts.iter().zip(&wants) {
                // one each may have been kept
                let less = u64::from(u64::from(limit) >= IDLE_SHARE * members);
                prop_assert!(u64::from(part) + less >= u64::from(want).min(equal), "{} of {}", part, want);
                prop_assert!(part > 0 || want == 0);
                if total <= equal {
                    prop_assert!(part >= want);
                }
            }
            // who has more than it wants has it because nobody wants it
            if parts.iter().zip(&wants).any(|(&part, &want)| part > want.max(1)) {
                prop_assert!(parts.iter().zip(&wants).all(|(part, want)| part >= want));
            }
            // who has less than it wants has as much as anybody, but for one
            let most = parts.iter().zip(&wants).filter(|(part, want)| part <= want).map(|(part, _)| *part).max();
            for (&part, &want) in parts.iter().zip(&wants) {
                prop_assert!(part >= want || part + 1 >= most.unwrap_or(0));
            }
        }

        #[test]
        fn one_more_that_is_wanted_moves_nobody_by_much(
            limit in 1u32..2000,
            wants in wants(),
            who in any::<prop::sample::Index>(),
        ) {
            let who = who.index(wants.len());
            prop_assume!(wants[who] < u32::MAX);
            let mut more = wants.clone();
            more[who] += 1;
            let (before, after) = (fair(limit, &wants), fair(limit, &more));
            for (at, (&before, &after)) in before.iter().zip(&after).enumerate() {
                prop_assert!(before.abs_diff(after) <= 2, "{} {} {}", at, before, after);
                prop_assert!(at != who || after >= before);
            }
        }

        #[test]
        fn who_gets_more_takes_no_more_than_is_free(
            limit in 1u32..500,
            members in prop::collection::vec((0u32..100, 0u32..100), 1..30),
        ) {
            let (wants, held): (Vec<u32>, Vec<u32>) = members.into_iter().unzip();
            let limit = at_least_one_each(limit, wants.iter().copied());
            let fair = fair(limit, &wants);
            let parts = attainable(limit, &fair, &held);
            prop_assert!(sum(&parts) <= u64::from(limit).max(sum(&held)));
            for ((&part, &fair), &held) in parts.iter().zip(&fair).zip(&held) {
                prop_assert!(part >= held && part <= fair.max(held));
            }
            if sum(&parts) < u64::from(limit) {
                prop_assert!(parts.iter().zip(&fair).all(|(part, fair)| part >= fair), "slots are left idle");
            }
        }
    }
}
