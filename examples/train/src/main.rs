use train::*;
use std::time::Instant;
use wgpu_optim::*;
fn main() -> anyhow::Result<()> {
    let data = data::Dataset::wines();
    let model = model::Model::new(data.features(), &[32, 32]);
    let task = task::Task { data, model, batch_rows: 256, epochs: 200 };
    let twin = cpu::Twin::new(&task);
    let start = task.start(1);
    let engine = gpu::Engine::new(Gpu::open_blocking(&AdapterRequest::default())?, &task)?;
    for lr in [0.16, 0.32] {
        for mu in [0.0, 0.9] {
            let rule: AnyRule = SgdConfig::builder(lr).momentum(mu).build()?.into();
            for device in [&twin as &dyn training::Device, &engine] {
                let t = Instant::now();
                let out = training::train(device, &task, (&rule, &start), (task.steps(), true), || ())?;
                println!("{lr} {mu} {} {:.4} {:?} {} {:?} all {:?}", device.name(), out.seconds, &out.losses.train[..3], out.losses.train[200], out.losses.held_out[200], t.elapsed());
                let out = training::train(device, &task, (&rule, &start), (task.steps(), false), || ())?;
                println!("   without evaluation {:.4} {:?}", out.seconds, out.losses.batches.last());
            }
        }
    }
    Ok(())
}
