//! One training example: ids and which of them count in the loss. What made it (chats, documents) is not known here.

/// One tokenised training example.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Example {
    /// Token ids, in order.
    pub ids: Vec<u32>,
    /// Whether the prediction of each id counts in the loss; as many as there are ids.
    pub trained: Vec<bool>,
}
