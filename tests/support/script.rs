//! An input, read as a script: numbers and choices, one after the other.

/// What is left of an input. Once it is over, everything is zero.
#[derive(Clone, Debug)]
pub struct Script<'a> {
    rest: &'a [u8],
}

impl<'a> Script<'a> {
    pub fn new(input: &'a [u8]) -> Script<'a> {
        Script { rest: input }
    }

    pub fn is_over(&self) -> bool {
        self.rest.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.rest.split_first() else { return 0 };
        self.rest = rest;
        byte
    }

    /// A number below `end`, and below 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// Any number: a small one is its own byte, 248 to 255 tell how many bytes follow, less 247.
    pub fn number(&mut self) -> u64 {
        let first = self.byte();
        let Some(more) = first.checked_sub(247) else { return first.into() };
        (0..more).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    pub fn u32(&mut self) -> u32 {
        self.number() as u32
    }

    /// A length and so many bytes, or as many as are there.
    pub fn bytes(&mut self) -> &'a [u8] {
        let length = usize::try_from(self.number()).unwrap_or(usize::MAX).min(self.rest.len());
        let (bytes, rest) = self.rest.split_at(length);
        self.rest = rest;
        bytes
    }

    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.byte())
    }

    /// A few of what `one` makes.
    pub fn list<T>(&mut self, mut one: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(16)).map(|_| one(self)).collect()
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }
}
