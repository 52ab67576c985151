//! Staging buffers that are mapped by the submission that fills them, and looked at when somebody asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::error_scope::checked;
use super::submission::{Fate, Submission};

/// A staging buffer for copies of one encoder after the other.
pub(super) struct MappedOnSubmit {
    buffer: wgpu::Buffer,
    arrival: Arc<AtomicU8>,
    /// The submission that maps it.
    submission: Option<Submission>,
}

const FREE: u8 = 0;
const ON_ITS_WAY: u8 = 1;
const MAPPED: u8 = 2;

/// Goes with a copy; one that is never submitted is dropped with its encoder.
struct Arrival(Arc<AtomicU8>);

impl Arrival {
    fn set_mapped(self, mapped: bool) {
        let to = if mapped { MAPPED } else { FREE };
        self.0.store(to, Ordering::Release);
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let (from, to) = (ON_ITS_WAY, FREE);
        let _ = self
            .0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
    }
}

impl MappedOnSubmit {
    pub(super) fn new(device: &wgpu::Device, label: &str, size: u64) -> Result<Self, wgpu::Error> {
        let create = || {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        Ok(Self {
            buffer: checked(device, create)?,
            arrival: Arc::new(AtomicU8::new(FREE)),
            submission: None,
        })
    }

    pub(super) fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    /// Whether the submission that it was sent with last is this one.
    pub(super) fn is_sent_with(&self, submission: &Submission) -> bool {
        let last = self.submission.as_ref();
        last.is_some_and(|last| last.is_same(submission))
    }

    /// Whether its submission may still fill it.
    pub(super) fn is_on_its_way(&self) -> bool {
        self.arrival.load(Ordering::Acquire) == ON_ITS_WAY
    }

    /// Whether its submission has filled it, and nobody has looked.
    pub(super) fn is_mapped(&self) -> bool {
        self.arrival.load(Ordering::Acquire) == MAPPED
    }

    /// Whether it is mapped, and its submission known to be done: wgpu says the former first.
    pub(super) fn has_arrived(&self) -> bool {
        let submission = self.submission.as_ref();
        let is_pending = submission.is_some_and(|of| of.fate() == Fate::Pending);
        self.is_mapped() && !is_pending
    }

    /// Has it mapped by the submission of this encoder, whose copies fill it.
    pub(super) fn send(&mut self, encoder: &wgpu::CommandEncoder, submission: &Submission) {
        self.submission = Some(submission.clone());
        self.arrival = Arc::new(AtomicU8::new(ON_ITS_WAY));
        let arrival = Arrival(self.arrival.clone());
        encoder.map_buffer_on_submit(&self.buffer, wgpu::MapMode::Read, .., move |mapped| {
            arrival.set_mapped(mapped.is_ok());
        });
    }

    /// The words of one that has arrived, which is then free; none if the device was lost meanwhile.
    pub(super) fn take_words(&mut self) -> Option<Vec<u32>> {
        let words = self.buffer.get_mapped_range(..).ok().map(|bytes| {
            let words = bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned);
            words.collect()
        });
        self.free();
        words
    }

    /// Has it free for other copies, whatever is in it.
    pub(super) fn free(&mut self) {
        if self.is_mapped() {
            self.buffer.unmap();
        }
        self.submission = None;
        self.arrival.store(FREE, Ordering::Release);
    }
}
