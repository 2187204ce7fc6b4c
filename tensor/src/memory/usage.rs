//! What buffers are for, and how many bytes of each kind there are.

use std::fmt;

/// What a buffer is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Category {
    /// Parameters of the model
    Weights,
    /// Gradients of trainable parameters
    Gradients,
    /// State of the optimizer
    Optimizer,
    /// Results of operations and what they save for the backward pass
    Activations,
    /// Scratch space of one kernel call
    Workspace,
}

impl Category {
    /// Every category, in the order in which reports list them.
    pub const ALL: [Category; 5] = [
        Category::Weights,
        Category::Gradients,
        Category::Optimizer,
        Category::Activations,
        Category::Workspace,
    ];
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Category::Weights => "weights",
            Category::Gradients => "gradients",
            Category::Optimizer => "optimizer",
            Category::Activations => "activations",
            Category::Workspace => "workspace",
        })
    }
}

/// Bytes in use, now and at the worst moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in use per category, in the order of [`Category::ALL`]
    pub live: [usize; 5],
    /// The most that each category held at any moment (not necessarily the same moment)
    pub peak: [usize; 5],
    /// The most that all categories held together
    pub peak_total: usize,
    /// Bytes obtained from the system: in use, kept for reuse, or lost between the two
    pub held: usize,
}

impl Usage {
    /// Bytes in use by `category`.
    pub fn live(&self, category: Category) -> usize {
        self.live[category as usize]
    }

    /// The most bytes that `category` ever used.
    pub fn peak(&self, category: Category) -> usize {
        self.peak[category as usize]
    }

    /// Counts `bytes` more in use.
    pub(super) fn count(&mut self, category: Category, bytes: usize) {
        let category = category as usize;
        self.live[category] += bytes;
        self.peak[category] = self.peak[category].max(self.live[category]);
        self.peak_total = self.peak_total.max(self.live.iter().sum());
    }

    /// Forgets past peaks: they restart at what is in use now.
    pub(super) fn reset_peak(&mut self) {
        self.peak = self.live;
        self.peak_total = self.live.iter().sum();
    }
}
