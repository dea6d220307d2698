//! A bounded number of numbered places, for connections. Who holds a place is named by a [`Token`], which is never given out
//! again: an event that comes late, for one that has left, finds nobody, and never the next in its place.

use std::time::Duration;

/// Names the content of a slot for as long as it is there; nobody after it. Fits into the data of an epoll event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token(u64);

/// The places.
#[derive(Debug)]
pub struct Slots<T> {
    slots: Vec<Option<Slot<T>>>,
    limit: u32,
    /// Counts what was put into any slot. It wraps after 2^32, long after the last event for the first was heard.
    generation: u32,
}

#[derive(Debug)]
struct Slot<T> {
    token: Token,
    deadline: Option<Duration>,
    content: T,
}

// === impl Token ===

impl Token {
    fn new(index: u32, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(index))
    }

    /// The data of an epoll event; its lower half is below the limit of the [`Slots`].
    pub fn data(self) -> u64 {
        self.0
    }

    /// The token in the data of an epoll event. Any number is one, if nobody's.
    pub fn of(data: u64) -> Self {
        Self(data)
    }

    fn index(self) -> usize {
        self.0 as u32 as usize
    }
}

// === impl Slots ===

impl<T> Slots<T> {
    /// `limit` free places.
    pub fn new(limit: u32) -> Self {
        Self {
            slots: Vec::new(),
            limit,
            generation: 0,
        }
    }

    /// Puts something into a free place; gives it back where there is none.
    ///
    /// # Errors
    /// Where all places are taken.
    pub fn insert(&mut self, content: T) -> Result<Token, T> {
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or(self.slots.len());
        let Some(number) = u32::try_from(index).ok().filter(|number| *number < self.limit) else {
            return Err(content);
        };
        self.generation = self.generation.wrapping_add(1);
        let token = Token::new(number, self.generation);
        let slot = Some(Slot {
            token,
            deadline: None,
            content,
        });
        match self.slots.get_mut(index) {
            Some(place) => *place = slot,
            None => self.slots.push(slot),
        }
        Ok(token)
    }

    fn slot(&mut self, token: Token) -> Option<&mut Slot<T>> {
        let slot = self.slots.get_mut(token.index())?.as_mut();
        slot.filter(|slot| slot.token == token)
    }

    /// What the token names.
    pub fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        self.slot(token).map(|slot| &mut slot.content)
    }

    /// Frees the place.
    pub fn remove(&mut self, token: Token) -> Option<T> {
        self.slot(token)?;
        let slot = self.slots.get_mut(token.index())?.take();
        slot.map(|slot| slot.content)
    }

    /// Frees all places.
    pub fn clear(&mut self) {
        self.slots.clear();
    }

    /// How many are taken.
    pub fn taken(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Until when it has to have done something, if it has to.
    pub fn deadline(&mut self, token: Token) -> Option<&mut Option<Duration>> {
        self.slot(token).map(|slot| &mut slot.deadline)
    }

    /// Those whose deadline is not later than `now`.
    pub fn expired(&self, now: Duration) -> Vec<Token> {
        let slots = self.slots.iter().flatten();
        let expired = slots.filter(|slot| slot.deadline.is_some_and(|deadline| deadline <= now));
        expired.map(|slot| slot.token).collect()
    }

    /// The first deadline that there is.
    pub fn first_deadline(&self) -> Option<Duration> {
        self.slots.iter().flatten().filter_map(|slot| slot.deadline).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_names_nobody_once_its_owner_has_left() {
        let mut slots = Slots::new(2);
        let first = slots.insert("first").unwrap();
        assert_eq!(slots.remove(first), Some("first"));
        let second = slots.insert("second").unwrap();
        assert_eq!(first.index(), second.index());
        assert_eq!(slots.get_mut(first), None);
        assert_eq!(slots.remove(first), None);
        assert_eq!(slots.deadline(first), None);
        slots.clear();
        let third = slots.insert("third").unwrap();
        assert_eq!(slots.get_mut(second), None);
        assert_eq!(slots.get_mut(Token::of(third.data())), Some(&mut "third"));
        for nobody in [0, 1, 256, u64::MAX, third.data() + 1] {
            assert_eq!(slots.get_mut(Token::of(nobody)), None);
        }
    }

    #[test]
    fn no_more_than_the_limit_have_a_place() {
        let mut slots = Slots::new(2);
        let first = slots.insert(1).unwrap();
        slots.insert(2).unwrap();
        assert_eq!((slots.insert(3), slots.taken()), (Err(3), 2));
        slots.remove(first);
        slots.insert(4).unwrap();
        assert_eq!(slots.insert(5), Err(5));
    }

    #[test]
    fn deadlines_pass_in_their_order() {
        let second = Duration::from_secs;
        let mut slots = Slots::new(3);
        let [late, early, never] = [1, 2, 3].map(|content| slots.insert(content).unwrap());
        *slots.deadline(late).unwrap() = Some(second(9));
        *slots.deadline(early).unwrap() = Some(second(3));
        assert_eq!(*slots.deadline(never).unwrap(), None);
        assert_eq!(slots.first_deadline(), Some(second(3)));
        assert_eq!(slots.expired(second(2)), []);
        assert_eq!(slots.expired(second(3)), [early]);
        slots.remove(early);
        assert_eq!(slots.first_deadline(), Some(second(9)));
        assert_eq!(slots.expired(second(100)), [late]);
    }
}
